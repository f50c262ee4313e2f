//! Other implementations, timed in the same run on the same shapes: Python processes that answer requests.

mod install;

use super::work::Pass;
use clap::ValueEnum;
use nsa_core::NsaConfig;
use nsa_kernels::Backend;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use thiserror::Error;

/// Names of `--peer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// PyTorch's full attention, the fastest of several ways to write it
    Torch,
    /// Sparse attention of flash-linear-attention, on NVIDIA GPUs
    Fla,
    /// Forward pass of the sparse attention of native-sparse-attention-pytorch
    Lucidrains,
}

/// What a peer is to run: each has a script of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Attention alone.
    Attention,
    /// Training steps of a model.
    Training,
    /// Kernels to run elsewhere.
    Kernels,
}

impl Peer {
    const fn script(self, work: Work) -> &'static str {
        match (self, work) {
            (Self::Torch, Work::Training) => "torch_train.py",
            (Self::Torch, _) => "torch_sdpa.py",
            (Self::Fla, Work::Kernels) => "fla_kernels.py",
            (Self::Fla, _) => "fla_nsa.py",
            (Self::Lucidrains, _) => "lucidrains_nsa.py",
        }
    }

    /// As `--peer` names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Torch => "torch",
            Self::Fla => "fla",
            Self::Lucidrains => "lucidrains",
        }
    }

    /// Whether it runs where a backend does.
    pub const fn runs_on(self, backend: &Backend) -> bool {
        match self {
            Self::Torch => true,
            Self::Fla => matches!(backend, Backend::Cuda(_)),
            Self::Lucidrains => matches!(backend, Backend::Cpu(_)),
        }
    }

    /// As tables and plots name it.
    pub fn title(self, version: &str) -> String {
        match self {
            Self::Torch => format!("PyTorch {}", version.split('+').next().unwrap_or_default()),
            Self::Fla => format!("fla {version}"),
            Self::Lucidrains => format!("lucidrains {version}"),
        }
    }

    /// Whether it runs this pass at all.
    pub const fn has(self, pass: Pass) -> bool {
        match self {
            Self::Torch => true,
            Self::Fla => matches!(pass, Pass::Forward | Pass::Backward),
            Self::Lucidrains => matches!(pass, Pass::Forward),
        }
    }
}

/// A request that needs nothing said.
const NO_JOB: Option<&Job> = None;

/// What can go wrong with a peer.
#[derive(Debug, Error)]
pub enum PeerError {
    /// No interpreter.
    #[error("`{python}` does not start ({reason}): install Python {MIN}, or name one with --peer-python", python = .python.display(), MIN = install::MIN_PYTHON_NAME)]
    NoPython {
        /// What was started.
        python: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// An interpreter that the packages do not support.
    #[error("`{python}` is Python {found}, and {needed} is needed: install that, or name one with --peer-python", python = .python.display(), needed = install::MIN_PYTHON_NAME)]
    OldPython {
        /// What was started.
        python: PathBuf,
        /// Its version.
        found: String,
    },
    /// The module venv or pip is missing.
    #[error("python3 cannot make an environment with pip: install its module venv (Debian: apt install python3-venv)")]
    NoVenv,
    /// No way to the package index.
    #[error(
        "the package index cannot be reached to fetch {packages}: connect, name a mirror in PIP_INDEX_URL, or name an \
         interpreter that has the packages with --peer-python"
    )]
    Unreachable {
        /// What was to be installed.
        packages: String,
    },
    /// The index lacks a package for this interpreter.
    #[error(
        "the package index has no {packages} for this Python and system ({reason}): try another Python, or name an \
         interpreter that has the packages with --peer-python"
    )]
    NoSuchVersion {
        /// What was to be installed.
        packages: String,
        /// pip's words.
        reason: String,
    },
    /// The disk is full.
    #[error("no space left to install {packages} below {folder}: PyTorch takes 6 GB where its index has no build for CPUs alone", folder = .folder.display())]
    DiskFull {
        /// What was to be installed.
        packages: String,
        /// Where.
        folder: PathBuf,
    },
    /// Any other failure of pip.
    #[error("{packages} cannot be installed: {reason}")]
    Install {
        /// What was to be installed.
        packages: String,
        /// The end of what pip said.
        reason: String,
    },
    /// The interpreter lacks the packages.
    #[error("`{python}` has no {module}: {reason}", python = .python.display())]
    NotImportable {
        /// What was started.
        python: PathBuf,
        /// What it was to import.
        module: &'static str,
        /// The end of what it said.
        reason: String,
    },
    /// The process ended or said something else than a reply.
    #[error("the peer {what}{}", if .stderr.is_empty() { String::new() } else { format!(": {}", .stderr) })]
    Died {
        /// How.
        what: String,
        /// The end of its standard error.
        stderr: String,
    },
    /// The peer answered that it cannot do this.
    #[error("{0}")]
    Refused(String),
    /// A file or process of the system.
    #[error("{action}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl PeerError {
    /// Whether it is about this shape alone: other shapes may run.
    pub const fn is_about_the_shape(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::Died { .. })
    }
}

/// What a peer is asked to time.
#[derive(Clone, Debug, Serialize)]
pub struct Job {
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    dim_qk: usize,
    dim_v: usize,
    compress_block: usize,
    compress_stride: usize,
    select_block: usize,
    select_count: usize,
    window: usize,
    dtype: &'static str,
    backward: bool,
    /// Sequences of a decoding step.
    batch: usize,
    /// Layers of the caches of decoding.
    copies: usize,
}

impl Job {
    /// The shapes of a configuration: one sequence, no layers of caches.
    pub fn new(config: &NsaConfig, tokens: usize, dtype: &'static str, backward: bool) -> Self {
        Self {
            tokens,
            heads: config.num_heads(),
            kv_heads: config.num_kv_heads(),
            dim_qk: config.head_dim_qk(),
            dim_v: config.head_dim_v(),
            compress_block: config.compress_block(),
            compress_stride: config.compress_stride(),
            select_block: config.select_block(),
            select_count: config.select_count(),
            window: config.window(),
            dtype,
            backward,
            batch: 1,
            copies: 0,
        }
    }

    /// Of decoding steps of so many sequences, with so many layers of caches.
    pub const fn decoding(self, batch: usize, copies: usize) -> Self {
        Self { batch, copies, ..self }
    }
}

/// A peer that is ready to run; its process starts with the first request and anew after it died.
#[derive(Debug)]
pub struct Ready {
    /// Which.
    pub peer: Peer,
    work: Work,
    /// As tables name it.
    pub title: String,
    python: PathBuf,
    /// Folder of packages beside the interpreter's own.
    packages: Option<PathBuf>,
    /// As PyTorch names it.
    device: String,
    threads: usize,
    memory_bytes: u64,
    process: Option<Process>,
}

impl Ready {
    /// Installs the peer unless it is there, or takes `python`'s packages; asks for its version.
    ///
    /// # Errors
    /// If it cannot be installed or started.
    pub fn prepare(
        peer: Peer,
        work: Work,
        backend: &Backend,
        python: Option<&Path>,
        memory_bytes: u64,
    ) -> Result<Self, PeerError> {
        let (python, packages) = install::prepare(peer, python)?;
        let (threads, title) = (rayon::current_num_threads(), String::new());
        let device = if let Backend::Cuda(cuda) = backend { cuda.name() } else { "cpu".to_owned() };
        let mut ready = Self { peer, work, title, python, packages, device, threads, memory_bytes, process: None };
        ready.process = Some(ready.start()?);
        Ok(ready)
    }

    fn start(&mut self) -> Result<Process, PeerError> {
        let script = install::scripts().join(self.peer.script(self.work));
        let mut process = Process::start(&self.python, &script, self.packages.as_deref())?;
        let hello = json!({
            "call": "hello",
            "device": self.device,
            "threads": self.threads,
            "memory_bytes": self.memory_bytes
        });
        let version: String = field(&process.ask(&hello)?, "version")?;
        self.title = self.peer.title(&version);
        Ok(process)
    }

    fn ask<J: Serialize>(&mut self, call: &str, job: Option<&J>) -> Result<Value, PeerError> {
        let mut process = match self.process.take() {
            Some(process) => process,
            None => self.start()?,
        };
        let mut request = job.map_or_else(|| json!({}), |job| json!(job));
        request["call"] = call.into();
        let reply = process.ask(&request);
        if !matches!(reply, Err(PeerError::Died { .. })) {
            self.process = Some(process);
        }
        reply
    }

    /// Makes inputs and chooses the fastest way for each pass; returns their names.
    ///
    /// # Errors
    /// If the peer cannot run this shape.
    pub fn attention(&mut self, job: &Job) -> Result<Vec<(Pass, String)>, PeerError> {
        let reply = self.ask("attention", Some(job))?;
        passes(&reply, job.backward)
    }

    /// One forward pass and, if the job has it, one backward pass; seconds.
    ///
    /// # Errors
    /// If the peer cannot run this shape.
    pub fn turn(&mut self, job: &Job) -> Result<Vec<(Pass, f64)>, PeerError> {
        let reply = self.ask("turn", NO_JOB)?;
        passes(&reply, job.backward)
    }

    /// Makes caches and chooses the fastest way to decode; returns its name.
    ///
    /// # Errors
    /// If the peer cannot run this shape.
    pub fn decode(&mut self, job: &Job) -> Result<String, PeerError> {
        field(&self.ask("decode", Some(job))?, "way")
    }

    /// Seconds of a decoding step.
    ///
    /// # Errors
    /// If the peer cannot run this shape.
    pub fn step(&mut self) -> Result<f64, PeerError> {
        field(&self.ask("step", NO_JOB)?, "seconds")
    }

    /// Makes a model, its optimizer and a batch, and chooses the fastest way to write the step; returns its name.
    ///
    /// # Errors
    /// If the peer cannot run this shape.
    pub fn train(&mut self, job: &impl Serialize) -> Result<String, PeerError> {
        field(&self.ask("train", Some(job))?, "way")
    }

    /// Seconds of a training step of a model made before, by its element type.
    ///
    /// # Errors
    /// If the peer cannot run this shape.
    pub fn training_step(&mut self, dtype: &str) -> Result<f64, PeerError> {
        field(&self.ask("step", Some(&json!({"dtype": dtype})))?, "seconds")
    }

    /// Compiles what the peer would launch, without a GPU; the reply as `count` reads it.
    ///
    /// # Errors
    /// If the peer cannot compile for this shape.
    pub fn kernels(&mut self, request: &impl Serialize) -> Result<Value, PeerError> {
        self.ask("kernels", Some(request))
    }

    /// Frees the inputs.
    pub fn drop_inputs(&mut self) {
        // A peer that died holds none.
        if self.process.is_some() && self.ask("drop", NO_JOB).is_err() {
            self.process = None;
        }
    }
}

fn passes<T: DeserializeOwned>(reply: &Value, backward: bool) -> Result<Vec<(Pass, T)>, PeerError> {
    let mut values = vec![(Pass::Forward, field(reply, "forward")?)];
    if backward && reply.get("backward").is_some() {
        values.push((Pass::Backward, field(reply, "backward")?));
    }
    Ok(values)
}

fn field<T: DeserializeOwned>(reply: &Value, name: &str) -> Result<T, PeerError> {
    let value = reply.get(name).cloned().unwrap_or(Value::Null);
    serde_json::from_value(value).map_err(|error| PeerError::Died {
        what: format!("replied `{reply}`, whose `{name}` is not as expected"),
        stderr: error.to_string(),
    })
}

/// A running peer.
#[derive(Debug)]
struct Process {
    child: Child,
    requests: ChildStdin,
    replies: BufReader<ChildStdout>,
    stderr: File,
}

impl Process {
    fn start(python: &Path, script: &Path, packages: Option<&Path>) -> Result<Self, PeerError> {
        let io = |action: &str| {
            let action = action.to_owned();
            move |source| PeerError::Io { action, source }
        };
        let stderr = tempfile::tempfile().map_err(io("cannot make a temporary file"))?;
        let mut command = Command::new(python);
        command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(stderr.try_clone().map_err(io("cannot use a temporary file"))?);
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        if let Some(packages) = packages {
            command.env("PYTHONPATH", packages);
        }
        let mut child = command
            .spawn()
            .map_err(|error| PeerError::NoPython { python: python.to_owned(), reason: error.to_string() })?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (requests, stdout) = stdin.zip(stdout).expect("both are piped");
        Ok(Self { child, requests, replies: BufReader::new(stdout), stderr })
    }

    fn ask(&mut self, request: &Value) -> Result<Value, PeerError> {
        let mut line = String::new();
        let sent = writeln!(self.requests, "{request}").and_then(|()| self.requests.flush());
        if sent.and_then(|()| self.replies.read_line(&mut line)).is_err() || line.is_empty() {
            let status = self.child.wait();
            return Err(PeerError::Died {
                what: status.map_or("is lost".to_owned(), ended),
                stderr: self.stderr_tail(),
            });
        }
        reply(&line)
    }

    fn stderr_tail(&mut self) -> String {
        let mut bytes = Vec::new();
        let read = self.stderr.seek(SeekFrom::Start(0)).and_then(|_| self.stderr.read_to_end(&mut bytes));
        read.map_or(String::new(), |_| install::tail(&String::from_utf8_lossy(&bytes)))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may sit in a long computation that nobody waits for any more; one that ended already cannot be killed.
        if self.child.kill().is_ok() {
            let _status = self.child.wait();
        }
    }
}

/// A line of a peer: what it was asked for, or why not.
fn reply(line: &str) -> Result<Value, PeerError> {
    let parsed: Result<Value, _> = serde_json::from_str(line);
    match parsed {
        Ok(Value::Object(mut reply)) => match (reply.remove("ok"), reply.remove("error")) {
            (Some(value), None) => Ok(value),
            (None, Some(Value::String(reason))) => Err(PeerError::Refused(reason)),
            _ => Err(PeerError::Died { what: format!("replied `{}`", line.trim()), stderr: String::new() }),
        },
        _ => Err(PeerError::Died { what: format!("replied `{}`", line.trim()), stderr: String::new() }),
    }
}

fn ended(status: ExitStatus) -> String {
    #[cfg(unix)]
    if std::os::unix::process::ExitStatusExt::signal(&status) == Some(9) {
        return "was killed, likely for want of memory".to_owned();
    }
    format!("ended ({status})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies() {
        assert_eq!(reply("{\"ok\": {\"seconds\": 0.5}}").expect("ok"), json!({"seconds": 0.5}));
        assert!(
            matches!(reply("{\"error\": \"no memory\"}"), Err(PeerError::Refused(reason)) if reason == "no memory")
        );
        for line in ["", "warning: slow", "{}", "[1]", "{\"ok\": 1, \"error\": \"x\"}", "{\"error\": 3}"] {
            assert!(matches!(reply(line), Err(PeerError::Died { .. })), "{line}");
        }
        let turn = json!({"forward": 1.0, "backward": 2.0});
        assert_eq!(passes::<f64>(&turn, true).expect("both"), [(Pass::Forward, 1.0), (Pass::Backward, 2.0)]);
        assert_eq!(passes::<f64>(&turn, false).expect("one"), [(Pass::Forward, 1.0)]);
        assert!(passes::<f64>(&json!({"backward": 1.0}), true).is_err());
        assert!(field::<f64>(&json!({"seconds": "fast"}), "seconds").is_err());
    }

    /// A stand-in for an interpreter: `sh script`.
    fn process(script: &str) -> (tempfile::NamedTempFile, Process) {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(script.as_bytes()).expect("room");
        let process = Process::start(Path::new("sh"), file.path(), None).expect("sh starts");
        (file, process)
    }

    #[cfg(unix)]
    #[test]
    fn a_process_answers_and_its_end_is_told() {
        let (_file, mut talker) = process("while read line; do echo \"{\\\"ok\\\": $line}\"; done");
        for n in 0..3 {
            assert_eq!(talker.ask(&json!({"call": n})).expect("an echo"), json!({"call": n}));
        }
        let (_file, mut dying) = process("read line; echo the reason >&2; exit 3");
        let error = dying.ask(&json!({})).expect_err("it ends").to_string();
        assert!(error.contains("exit status: 3") && error.contains("the reason"), "{error}");
        let (_file, mut killed) = process("read line; kill -9 $$");
        let error = killed.ask(&json!({})).expect_err("it is killed").to_string();
        assert!(error.contains("memory"), "{error}");
    }

    #[test]
    fn an_interpreter_that_is_not_there() {
        let missing = Path::new("/nowhere/python");
        let error = Process::start(missing, Path::new("script.py"), None).expect_err("no such file");
        assert!(matches!(&error, PeerError::NoPython { python, .. } if python == missing));
        assert!(error.to_string().contains("--peer-python"), "{error}");
    }
}
