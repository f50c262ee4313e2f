//! Work that is given to the device as one piece, and copies whose places it is told before.

use nsa_kernels::layer::copy::{Piece, Table};
use nsa_kernels::layer::{linear, sigmoid};
use nsa_kernels::{Backend, Buffer, Cuda, Error, Result};
use nsa_tests::sim::{leave_free, on_a_small_a100, on_an_a100};
use std::sync::Barrier;

fn device() -> (Backend, Cuda) {
    let backend = Backend::cuda(0).expect("the simulator");
    let Backend::Cuda(cuda) = backend.clone() else { panic!("a CUDA device") };
    (backend, cuda)
}

fn read(buffer: &Buffer<f32>) -> Vec<f32> {
    let mut host = vec![0.0; buffer.len()];
    buffer.read(&mut host).expect("there");
    host
}

/// Numbers that differ.
fn numbers(from: usize, count: usize) -> Vec<f32> {
    (from..from + count).map(|i| 0.25 * (i % 61) as f32 - 7.0).collect()
}

fn piece<'a>(
    source: &'a Buffer<f32>,
    from: usize,
    target: &'a mut Buffer<f32>,
    to: usize,
    len: usize,
) -> Piece<'a, f32> {
    Piece {
        source: source.tensor_at(from, [len]).expect("inside"),
        target: target.tensor_mut_at(to, [len]).expect("inside"),
    }
}

/// What is recorded copies what the table says when it is done, to other places and of other lengths than it said before.
#[test]
fn tables_say_what_is_copied() {
    on_an_a100("record::tables_say_what_is_copied", || {
        let (backend, cuda) = device();
        let source = backend.upload(&numbers(0, 9000));
        let targets = || [0; 3].map(|_| backend.upload(&[-1.0f32; 9000]));
        let mut table = Table::new(&backend, 2, 3).expect("memory");
        assert_eq!(table.shape(), [2, 3]);
        table.run(1).expect("nothing to copy");
        let graph = cuda.record(|| table.run(1).and_then(|()| table.run(0))).expect("recorded");
        let all = numbers(0, 9000);
        for (from, lens) in [(0, [1, 8000, 4]), (17, [0, 3, 5]), (4, [8, 9, 0])] {
            let mut targets = targets();
            let [first, second, third] = &mut targets;
            let last = piece(&source, from, third, 2 * from, lens[2]);
            let copies = vec![piece(&source, from, first, 5, lens[0]), piece(&source, from + 9, second, 0, lens[1])];
            table.set(1, copies).expect("two copies");
            table.set(0, vec![last]).expect("one copy");
            table.send().expect("sent");
            graph.launch().expect("the graph");
            for ((target, (from, to)), len) in
                targets.iter().zip([(from, 5), (from + 9, 0), (from, 2 * from)]).zip(lens)
            {
                let mut expected = vec![-1.0; 9000];
                expected[to..to + len].copy_from_slice(&all[from..from + len]);
                assert_eq!(read(target), expected);
            }
        }
        let (mut long, mut short) = (backend.alloc::<f32>(8), backend.alloc::<f32>(8));
        let graph = cuda.record(|| {
            long.copy_from(2, &source, 100..103)?;
            short.tensor_mut([5])?.fill(0.0)
        });
        long.write(&[3.0; 8]).expect("there");
        short.write(&[4.0; 8]).expect("there");
        graph.expect("recorded").launch().expect("the graph");
        let expected = [&[3.0; 2], &all[100..103], &[3.0; 3]].concat();
        assert_eq!((read(&long), read(&short)), (expected, vec![0.0, 0.0, 0.0, 0.0, 0.0, 4.0, 4.0, 4.0]));
        let message = |result: Result<()>| result.expect_err("wrong").to_string();
        let wrong = Piece { source: source.tensor([4]).unwrap(), target: long.tensor_mut([5]).unwrap() };
        assert!(message(table.set(0, vec![wrong])).contains("copy::Table: `target`"));
        let (mut rest, mut four) = (short.tensor_mut([8]).unwrap(), Vec::new());
        for _ in 0..4 {
            let (target, after) = rest.split_at(2).unwrap();
            four.push(Piece { source: source.tensor([2]).unwrap(), target });
            rest = after;
        }
        assert!(message(table.set(0, four)).contains("copies"));
        assert!(message(table.run(2)).contains("slots"));
        let cpu = Backend::pick(Some("cpu")).unwrap().0;
        assert!(message(Table::new(&cpu, 1, 1).map(drop)).contains("copy::all"));
    });
}

/// More copies than a grid has rows of blocks: of steps of thousands of sequences.
#[test]
fn a_table_has_any_number_of_copies() {
    on_an_a100("record::a_table_has_any_number_of_copies", || {
        const COPIES: usize = (1 << 16) + 3;
        let (backend, _) = device();
        let source = backend.upload(&numbers(0, COPIES));
        let mut target = backend.alloc::<f32>(COPIES);
        let mut table = Table::new(&backend, 1, COPIES).expect("memory");
        let mut rest = target.tensor_mut([COPIES]).expect("inside");
        let mut copies = Vec::new();
        for at in 0..COPIES {
            let (target, after) = rest.split_at(1).expect("inside");
            copies.push(Piece { source: source.tensor_at(at, [1]).expect("inside"), target });
            rest = after;
        }
        table.set(0, copies).expect("as many as it has");
        table.send().expect("sent");
        table.run(0).expect("copied");
        assert_eq!(read(&target), numbers(0, COPIES));
    });
}

/// y = x·Wᵀ, of many rows by cuBLAS and a copy of the weight in another type, then the sigmoid.
struct Work {
    backend: Backend,
    outputs: usize,
    x: Buffer<f32>,
    weight: Buffer<half::bf16>,
    y: Buffer<f32>,
    z: Buffer<f32>,
}

const ROWS: usize = 40;
const WIDTH: usize = 24;
const OUTPUTS: usize = 7;

impl Work {
    fn new(backend: &Backend) -> Self {
        Self::of_outputs(backend, OUTPUTS)
    }

    fn of_outputs(backend: &Backend, outputs: usize) -> Self {
        let weight: Vec<_> = numbers(5, outputs * WIDTH).into_iter().map(|x| half::bf16::from_f32(x / 16.0)).collect();
        Self {
            backend: backend.clone(),
            outputs,
            x: backend.alloc(ROWS * WIDTH),
            weight: backend.upload(&weight),
            y: backend.alloc(ROWS * outputs),
            z: backend.alloc(ROWS * outputs),
        }
    }

    /// Of f32 alone, which takes nothing but cuBLAS.
    fn multiply(&mut self) -> Result<()> {
        let (x, weight) = (self.x.tensor([ROWS, WIDTH])?, self.x.tensor([OUTPUTS, WIDTH])?);
        let y = self.y.tensor_mut([ROWS, OUTPUTS])?;
        linear::forward(&self.backend, linear::Forward { x, weight, bias: None, y, accumulate: false })
    }

    fn run(&mut self, rows: usize) -> Result<()> {
        let args = linear::Forward {
            x: self.x.tensor([rows, WIDTH])?,
            weight: self.weight.tensor([self.outputs, WIDTH])?,
            bias: None,
            y: self.y.tensor_mut([rows, self.outputs])?,
            accumulate: false,
        };
        linear::forward(&self.backend, args)?;
        let (x, y) = (self.y.tensor([rows, self.outputs])?, self.z.tensor_mut([rows, self.outputs])?);
        sigmoid::forward(&self.backend, sigmoid::Forward { x, y })
    }

    /// What comes out of numbers from `from` on, as bits.
    fn of(&mut self, from: usize, mut run: impl FnMut(&mut Self) -> Result<()>) -> Vec<u32> {
        self.x.write(&numbers(from, ROWS * WIDTH)).expect("there");
        self.z.write(&[-1.0; ROWS * OUTPUTS]).expect("there");
        run(self).expect("runs");
        read(&self.z).into_iter().map(f32::to_bits).collect()
    }
}

/// A recorder does work, records it, repeats it: the same bits every time, for every key; and again after what it has is void.
#[test]
fn work_is_done_then_recorded_then_repeated() {
    on_an_a100("record::work_is_done_then_recorded_then_repeated", || {
        let (backend, _) = device();
        let (mut work, mut called) = (Work::new(&backend), 0);
        let mut recorder = backend.recorder::<usize>().expect("a device records");
        assert!(recorder.is_empty());
        for round in 0..4 {
            for rows in [2, ROWS, 0] {
                let expected = work.of(100 * round + rows, |work| work.run(rows));
                let repeated = work.of(100 * round + rows, |work| {
                    recorder.run(rows, || {
                        called += 1;
                        work.run(rows)
                    })
                });
                assert_eq!(repeated, expected, "round {round}, {rows} rows");
            }
        }
        // Twice each: done and recorded; the first once more, since the memory for the second was made anew.
        assert_eq!((called, recorder.len()), (7, 3));
        recorder.forget();
        assert_eq!(recorder.len(), 0);
        for round in 0..3 {
            let expected = work.of(round, |work| work.run(ROWS));
            assert_eq!(work.of(round, |work| recorder.run(ROWS, || work.run(ROWS))), expected);
        }
        for key in 100..140 {
            for _ in 0..2 {
                recorder.run(key, || work.run(1)).expect("runs");
            }
        }
        assert_eq!(recorder.len(), 32, "the last ones");
        let failed: Result<()> = recorder.run(7, || work.run(ROWS + 1));
        failed.expect_err("more rows than there are");
        let cpu = Backend::pick(Some("cpu")).unwrap().0;
        assert!(cpu.recorder::<usize>().is_none());
    });
}

/// Where cuBLAS cannot be opened for want of memory, it is later.
#[test]
fn cublas_is_opened_when_there_is_memory() {
    on_a_small_a100("record::cublas_is_opened_when_there_is_memory", 64 << 20, || {
        let (backend, cuda) = device();
        let (mut work, mut again) = (Work::new(&backend), Work::new(&backend));
        let record = |work: &mut Work| cuda.record(|| work.multiply());
        let refused = |work: &mut dyn FnMut() -> Result<()>| {
            let taken = leave_free(&backend, 1 << 20);
            let message = work().expect_err("no memory").to_string();
            assert!(message.contains("8.00 MiB asked for: CUDA_ERROR_OUT_OF_MEMORY"), "{message}");
            drop(taken);
        };
        refused(&mut || work.multiply());
        work.multiply().expect("memory");
        refused(&mut || record(&mut again).map(drop));
        record(&mut again).expect("memory").launch().expect("the graph");
        assert_eq!(read(&work.y), read(&again.y));
    });
}

/// Work that leaves no memory for what it needs the next time ends all records: what they use is given back by then.
#[test]
fn no_record_outlives_its_memory() {
    on_a_small_a100("record::no_record_outlives_its_memory", 64 << 20, || {
        let (backend, _) = device();
        let (mut work, mut wide) = (Work::new(&backend), Work::of_outputs(&backend, 9 * OUTPUTS));
        let mut recorder = backend.recorder::<usize>().expect("a device records");
        let expected = work.of(3, |work| work.run(ROWS));
        for _ in 0..2 {
            work.of(3, |work| recorder.run(0, || work.run(ROWS)));
        }
        assert_eq!(recorder.len(), 1);
        let mut taken = None;
        let result = recorder.run(1, || {
            wide.run(ROWS)?;
            taken = Some(leave_free(&backend, 0));
            Ok::<_, Error>(())
        });
        let message = result.expect_err("no memory").to_string();
        assert!(message.contains("KiB asked for: CUDA_ERROR_OUT_OF_MEMORY"), "{message}");
        assert!(message.contains(" of the 64.00 MiB of cuda:0 are free"), "{message}");
        assert_eq!(recorder.len(), 0);
        drop(taken);
        let elsewhere = backend.upload(&[-1.0f32; 256]);
        for _ in 0..3 {
            assert_eq!(work.of(3, |work| recorder.run(0, || work.run(ROWS))), expected);
        }
        assert!(read(&elsewhere).iter().all(|x| *x == -1.0));
    });
}

/// Work that fails leaves no trace: what it needed is not asked for by the next, and records go on in the memory that they have.
#[test]
fn work_that_fails_changes_nothing() {
    on_a_small_a100("record::work_that_fails_changes_nothing", 64 << 20, || {
        let (backend, cuda) = device();
        let (mut work, mut wide) = (Work::new(&backend), Work::of_outputs(&backend, 9 * OUTPUTS));
        let expected = work.of(3, |work| work.run(ROWS));
        let mut recorder = backend.recorder::<usize>().expect("a device records");
        for key in [0, 0, 1] {
            work.of(3, |work| recorder.run(key, || work.run(ROWS)));
        }
        let failed = recorder.run(2, || {
            wide.run(ROWS)?;
            linear::forward(
                &backend,
                linear::Forward {
                    x: wide.x.tensor([ROWS, WIDTH])?,
                    weight: wide.x.tensor([ROWS, WIDTH])?,
                    bias: None,
                    y: wide.y.tensor_mut([1, 1])?,
                    accumulate: false,
                },
            )
        });
        failed.expect_err("a product of another shape");
        // No memory is left: what is recorded needs none.
        let taken = leave_free(&backend, 0);
        for key in [1, 0, 1] {
            assert_eq!(work.of(3, |work| recorder.run(key, || work.run(ROWS))), expected, "key {key}");
        }
        assert_eq!(recorder.len(), 2);
        drop(taken);

        let mut workspace = nsa_kernels::cuda::workspace::Workspace::new(&cuda);
        let taken = leave_free(&backend, 0);
        cuda.with_workspace(&mut workspace, || wide.run(ROWS)).expect_err("no memory");
        assert_eq!(workspace.bytes(), 0);
        drop(taken);
        cuda.with_workspace(&mut workspace, || work.run(ROWS)).expect("runs");
        let held = workspace.bytes();
        cuda.with_workspace(&mut workspace, || wide.run(ROWS)).expect("runs");
        assert!(workspace.bytes() > held, "as much as was needed, and no more");
        // Nor what there was no memory to grow to.
        let (mut workspace, mut taken) = (nsa_kernels::cuda::workspace::Workspace::new(&cuda), None);
        let grown = cuda.with_workspace(&mut workspace, || {
            wide.run(ROWS)?;
            taken = Some(leave_free(&backend, 0));
            Ok::<_, Error>(())
        });
        grown.expect_err("no memory");
        drop(taken);
        cuda.with_workspace(&mut workspace, || work.run(ROWS)).expect("runs");
        assert_eq!(workspace.bytes(), held);
    });
}

/// While one thread records, what another one asks for is done, and is not in the record.
#[test]
fn other_threads_go_on() {
    on_an_a100("record::other_threads_go_on", || {
        let (backend, cuda) = device();
        let (mut recorded, mut other) = (Work::new(&backend), Work::new(&backend));
        let expected = [3, 4].map(|from| recorded.of(from, |work| work.run(ROWS)));
        let mut workspace = nsa_kernels::cuda::workspace::Workspace::new(&cuda);
        cuda.with_workspace(&mut workspace, || recorded.run(ROWS)).expect("runs");
        let held = workspace.bytes();
        recorded.of(3, |_| Ok(()));
        let (begun, done) = (Barrier::new(2), Barrier::new(2));
        let graph = std::thread::scope(|scope| {
            scope.spawn(|| {
                begun.wait();
                assert_eq!(other.of(4, |work| work.run(ROWS)), expected[1]);
                done.wait();
            });
            cuda.record(|| {
                cuda.with_workspace(&mut workspace, || {
                    begun.wait();
                    let result = recorded.run(ROWS);
                    done.wait();
                    result
                })
            })
        });
        assert_eq!(workspace.bytes(), held, "the other thread took nothing of it");
        let graph = graph.expect("recorded");
        assert!(read(&recorded.z).iter().all(|x| *x == -1.0), "nothing was done");
        other.of(5, |_| Ok(()));
        graph.launch().expect("the graph");
        assert!(read(&other.z).iter().all(|x| *x == -1.0), "of the other's work nothing is recorded");
        let got: Vec<u32> = read(&recorded.z).into_iter().map(f32::to_bits).collect();
        assert_eq!(got, expected[0]);
        // Another thread may have it.
        let mut graph = Some(graph);
        let launched = recorded.of(4, |_| {
            let graph = graph.take().expect("once");
            std::thread::spawn(move || graph.launch()).join().expect("no panic")
        });
        assert_eq!(launched, expected[1]);
    });
}

/// A graph has the kernels that are in it, also when nothing else has them.
#[test]
fn a_graph_outlives_who_recorded_it() {
    on_an_a100("record::a_graph_outlives_who_recorded_it", || {
        let (backend, cuda) = device();
        let (x, mut y) = (backend.upload(&[0.0f32; 8]), backend.alloc::<f32>(8));
        let graph = {
            // With kernels of its own.
            let other = Cuda::on_stream(cuda.stream().clone()).expect("the same device");
            let mut work = || {
                let args = sigmoid::Forward { x: x.tensor([1, 8])?, y: y.tensor_mut([1, 8])? };
                sigmoid::forward(&Backend::Cuda(other.clone()), args)
            };
            work().expect("runs");
            other.record(work).expect("recorded")
        };
        y.write(&[-1.0; 8]).expect("there");
        graph.launch().expect("the graph");
        assert_eq!(read(&y), [0.5; 8]);
    });
}

/// What cannot be recorded is an error that says so, and the device goes on afterwards.
#[test]
fn what_cannot_be_recorded_is_an_error() {
    on_an_a100("record::what_cannot_be_recorded_is_an_error", || {
        let (backend, cuda) = device();
        let (mut buffer, mut work) = (backend.alloc::<f32>(8), Work::new(&backend));
        let expected = work.of(1, |work| work.run(ROWS));
        let message = |result: Result<()>| result.expect_err("refused").to_string();
        let record = |work: &mut dyn FnMut() -> Result<()>| message(cuda.record(work).map(drop));
        // Before anything else: on a device that has not multiplied yet.
        let (_, other) = device();
        let mut others = Work::new(&Backend::Cuda(other.clone()));
        let early = message(other.record(|| others.multiply()).map(drop));
        assert!(early.contains("cuBLAS is not open"), "{early}");
        let alone = record(&mut || work.run(ROWS));
        assert!(alone.contains("Cuda::record") && alone.contains("make memory before"), "{alone}");
        assert!(record(&mut || buffer.write(&[1.0])).contains("from the host cannot be recorded"));
        assert!(record(&mut || buffer.read(&mut [0.0])).contains("to the host cannot be recorded"));
        assert!(record(&mut || backend.alloc::<f32>(1).made().map(drop)).contains("make memory before"));
        assert!(record(&mut || cuda.record(|| Ok::<_, Error>(())).map(drop)).contains("records already"));
        assert!(std::panic::catch_unwind(|| cuda.record::<Error>(|| panic!("in the middle"))).is_err());
        assert_eq!(work.of(1, |work| work.run(ROWS)), expected);
        let empty = cuda.record(|| Ok::<_, Error>(())).expect("nothing to record");
        empty.launch().expect("nothing to do");
    });
}
