//! Cases of what came with sm_90: bulk copies, tensor maps, `wgmma`, `stmatrix`, `elect`.

use super::values::random;
use super::{Case, TensorMap};
use half::{bf16, f16};
use rand::RngExt;
use std::fmt::Write;

/// Bytes of shared memory that a case fills and may print.
const BUFFER: usize = 32768;

/// A kernel with a filled buffer `sb` of shared memory, a barrier object at `mb`, and registers to use: `r0` … `r15`,
/// `d0` … `d7`, `f0` … `f127`, `p`, `q`. `map` is the address of the tensor map.
fn kernel(name: &str, threads: u32, body: &str, input: Vec<u8>, output: usize, map: Option<TensorMap>) -> Case {
    let mut ptx = String::new();
    let _ = write!(
        ptx,
        ".version 8.0\n.target sm_90a\n.address_size 64\n\
         .visible .entry k(.param .u64 pin, .param .u64 pout{})\n{{\n\
         .shared .align 1024 .b8 buffer[{BUFFER}];\n.shared .align 8 .b8 object[8];\n\
         .reg .b32 tid, sb, mb, x, y;\n.reg .b32 r<16>;\n.reg .b32 f<128>;\n.reg .b64 gin, gout, w, map;\n.reg .b64 d<8>;\n.reg .pred p, q, first;\n\
         mov.u32 tid, %tid.x;\nmov.u32 sb, buffer;\nmov.u32 mb, object;\nld.param.u64 gin, [pin];\nld.param.u64 gout, [pout];\n{}\
         setp.eq.u32 first, tid, 0;\nmov.u32 x, tid;\n\
         FILL:\nmul.wide.u32 w, x, 4;\nadd.u64 w, gin, w;\nld.global.b32 y, [w];\n\
         shl.b32 r0, x, 2;\nadd.u32 r0, r0, sb;\nst.shared.b32 [r0], y;\n\
         add.u32 x, x, {threads};\nsetp.lt.u32 p, x, {};\n@p bra FILL;\n\
         @first mbarrier.init.shared::cta.b64 [mb], 1;\n\
         fence.proxy.async;\nbar.sync 0;\n{body}\nret;\n}}\n",
        if map.is_some() { ", .param .align 64 .b8 pmap[128]" } else { "" },
        if map.is_some() { "mov.b64 map, pmap;\ncvta.param.u64 map, map;\n" } else { "" },
        BUFFER / 4,
    );
    Case { name: name.to_owned(), ptx, grid: 1, block: threads, shared: 0, input, output, map }
}

/// Prints `words` words of shared memory.
fn dump(threads: u32, words: usize) -> String {
    format!(
        "mov.u32 x, tid;\nDUMP:\nshl.b32 y, x, 2;\nadd.u32 y, y, sb;\nld.shared.b32 y, [y];\nmul.wide.u32 w, x, 4;\nadd.u64 w, w, gout;\n\
         st.global.b32 [w], y;\nadd.u32 x, x, {threads};\nsetp.lt.u32 p, x, {words};\n@p bra DUMP;\n"
    )
}

fn bytes(name: &str, count: usize) -> Vec<u8> {
    let mut random = random(name);
    (0..count).map(|_| random.random()).collect()
}

/// All cases.
pub fn cases() -> Vec<Case> {
    let mut cases = super::arithmetic::brain_of_hopper();
    cases.extend(small());
    cases.extend(bulk());
    cases.extend(tensor_maps());
    cases.extend(wgmma());
    cases
}

fn small() -> Vec<Case> {
    let mut cases = Vec::new();
    for (count, regs) in [(1, "{r0}"), (2, "{r0, r1}"), (4, "{r0, r1, r2, r3}")] {
        for trans in ["", ".trans"] {
            let opcode = format!("stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16");
            let body = format!(
                "mul.lo.u32 x, tid, 7;\nand.b32 x, x, 31;\nmul.lo.u32 x, x, 48;\nadd.u32 x, x, sb;\n\
                 mul.lo.u32 r0, tid, 0x10001;\nadd.u32 r1, r0, 0x01000200;\nadd.u32 r2, r0, 0x03000400;\nadd.u32 r3, r0, 0x05000600;\n\
                 {opcode} [x], {regs};\nbar.sync 0;\n{}",
                dump(32, 512)
            );
            cases.push(kernel(&opcode, 32, &body, bytes(&opcode, BUFFER), 2048, None));
        }
    }
    let body = "mul.wide.u32 w, tid, 64;\nadd.u64 gout, gout, w;\nelect.sync r0|p, -1;\nselp.u32 r1, 1, 0, p;\nst.global.b32 [gout], r0;\nst.global.b32 [gout+4], r1;\n\
                mov.u32 r2, %cluster_ctarank;\nmov.u32 r3, %cluster_nctarank;\nst.global.b32 [gout+8], r2;\nst.global.b32 [gout+12], r3;\n\
                setmaxnreg.inc.sync.aligned.u32 232;\n";
    cases.push(kernel("elect.sync", 128, body, bytes("elect", BUFFER), 64 * 128, None));
    let body = format!(
        "@!first bra WAIT;\nmbarrier.arrive.expect_tx.shared::cta.b64 d0, [mb], 64;\nmbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [mb], 64;\n\
         WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [mb], 0;\n@!p bra WAIT;\n{}",
        dump(64, 64)
    );
    cases.push(kernel("mbarrier expect_tx and complete_tx", 64, &body, bytes("tx", BUFFER), 256, None));
    cases
}

fn wait() -> &'static str {
    "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [mb], 0;\n@!p bra WAIT;\nbar.sync 0;\n"
}

fn bulk() -> Vec<Case> {
    let mut cases = Vec::new();
    let body = format!(
        "@!first bra WAIT;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [mb], 1040;\n\
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sb], [gin+16384], 1040, [mb];\n{}{}",
        wait(),
        dump(64, 512)
    );
    cases.push(kernel("cp.async.bulk to shared", 64, &body, bytes("bulk", BUFFER), 2048, None));
    let body = "@!first bra DONE;\ncp.async.bulk.global.shared::cta.bulk_group [gout+32], [sb+64], 512;\n\
                cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\nDONE:\n";
    cases.push(kernel("cp.async.bulk to global", 64, body, bytes("bulk out", BUFFER), 1024, None));
    for (op, count) in [("add.u32", 64), ("max.s32", 64), ("and.b32", 64), ("add.noftz.bf16", 64), ("add.f32", 64)] {
        let body = format!(
            "@!first bra DONE;\ncp.reduce.async.bulk.global.shared::cta.bulk_group.{op} [gout], [sb], {};\n\
             cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;\ncp.async.bulk.wait_group 0;\nDONE:\n",
            4 * count
        );
        let name = format!("cp.reduce.async.bulk.{op}");
        cases.push(kernel(&name, 64, &body, bytes(&name, BUFFER), 1024, None));
    }
    cases
}

/// A tensor whose elements lie one after the other, the innermost dimension first.
fn dense(data_type: u32, element_bytes: u64, sizes: &[u64], tile: &[u32]) -> TensorMap {
    let mut stride = element_bytes;
    let strides = sizes[..sizes.len() - 1].iter().map(|size| {
        stride *= size;
        stride
    });
    TensorMap {
        data_type,
        strides: strides.collect(),
        sizes: sizes.to_vec(),
        tile: tile.to_vec(),
        steps: vec![1; sizes.len()],
        interleave: 0,
        swizzle: 0,
        fill: 0,
        of_output: false,
    }
}

/// Sets r0, r1, … to coordinates.
fn coordinates(origin: &[i32]) -> String {
    origin.iter().enumerate().map(|(at, value)| format!("mov.b32 r{at}, {value};\n")).collect()
}

/// Loads a tile of so many bytes and writes words of shared memory out.
fn tile_load(dims: &str, origin: &[i32], registers: &str, bytes: u32, words: usize) -> String {
    format!(
        "{}@!first bra WAIT;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [mb], {bytes};\n\
         cp.async.bulk.tensor.{dims}.shared::cluster.global.mbarrier::complete_tx::bytes [sb], [map, {registers}], [mb];\n{}{}",
        coordinates(origin),
        wait(),
        dump(64, words)
    )
}

fn tensor_maps() -> Vec<Case> {
    let mut cases = Vec::new();
    // bf16, 128 columns; tiles as wide as the swizzle.
    for (swizzle, columns) in [(0, 32), (0, 64), (1, 16), (2, 32), (3, 64), (3, 32)] {
        for (name, origin) in [("inside", [16i32, 8]), ("over the end", [112, 60]), ("before the start", [-8, -4])] {
            let name = format!("tensor copy 2d, swizzle {swizzle}, {columns} columns, {name}");
            let map = TensorMap { swizzle, ..dense(9, 2, &[128, 64], &[columns, 16]) };
            let body = tile_load("2d", &origin, "{r0, r1}", columns * 32, columns as usize * 8 + 16);
            let input = numbers(&name, "bf16");
            cases.push(kernel(&name, 64, &body, input, (columns as usize * 8 + 16) * 4, Some(map)));
        }
    }
    cases.extend(more_dimensions());
    cases.extend(tensor_stores());
    cases
}

fn more_dimensions() -> Vec<Case> {
    let mut cases = Vec::new();
    let shapes = [
        ("1d", vec![4096u64], vec![128u32], "{r0}", [100, 0, 0, 0, 0]),
        ("3d", vec![32, 16, 16], vec![16, 4, 2], "{r0, r1, r2}", [20, 14, 15, 0, 0]),
        ("4d", vec![16, 8, 8, 8], vec![8, 2, 2, 2], "{r0, r1, r2, r3}", [8, 3, 7, 2, 0]),
        ("5d", vec![8, 8, 4, 4, 4], vec![4, 2, 2, 2, 2], "{r0, r1, r2, r3, r4}", [4, 1, 3, 2, 1]),
    ];
    for (dims, sizes, tile, coordinates, origin) in shapes {
        // f32, NaN outside
        let words: u32 = tile.iter().product();
        let name = format!("tensor copy {dims}, type 7");
        let body = tile_load(dims, &origin, coordinates, 4 * words, words as usize);
        let map = TensorMap { fill: 1, ..dense(7, 4, &sizes, &tile) };
        cases.push(kernel(&name, 64, &body, bytes(&name, BUFFER), words as usize * 4, Some(map)));
    }
    cases
}

fn tensor_stores() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, opcode) in [
        ("tensor store", "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"),
        ("tensor reduction", "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group"),
    ] {
        for (swizzle, origin) in [(0, [8, 4]), (3, [0, 12]), (2, [24, 2])] {
            let columns = if swizzle == 3 { 32 } else { 16 };
            let name = format!("{name}, swizzle {swizzle}");
            let map = TensorMap { swizzle, of_output: true, ..dense(4, 4, &[32, 16], &[columns, 8]) };
            let body = format!(
                "{}@!first bra DONE;\n{opcode} [map, {{r0, r1}}], [sb];\n\
                 cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\nDONE:\n",
                coordinates(&origin)
            );
            cases.push(kernel(&name, 64, &body, bytes(&name, BUFFER), 2048, Some(map)));
        }
    }
    cases
}

/// Small integers of a type, or uniform numbers, that fill the buffer.
fn numbers(name: &str, ty: &str) -> Vec<u8> {
    let mut random = random(name);
    let mut out = Vec::with_capacity(BUFFER);
    let uniform = name.contains("uniform");
    while out.len() < BUFFER {
        let value = if uniform { random.random_range(-1.0..1.0) } else { f64::from(random.random_range(-8i32..9)) };
        match ty {
            "bf16" => out.extend(bf16::from_f64(value).to_bits().to_le_bytes()),
            "f16" => out.extend(f16::from_f64(value).to_bits().to_le_bytes()),
            "tf32" => out.extend((value as f32).to_bits().to_le_bytes()),
            _ => out.push(value as i8 as u8),
        }
    }
    out
}

struct Product<'a> {
    types: &'a str,
    columns: u32,
    depth: u32,
    swizzle: u64,
    /// Offsets in bytes: leading and stride of A, then of B.
    offsets: [u64; 4],
    transposed: [u32; 2],
    a_in_registers: bool,
    scales: [i32; 2],
    accumulate: bool,
    label: &'a str,
}

fn descriptor(register: &str, at: u64, leading: u64, stride: u64, swizzle: u64) -> String {
    let fixed = (leading >> 4) << 16 | (stride >> 4) << 32 | swizzle << 62;
    format!(
        "add.u32 x, sb, {at};\nshr.u32 x, x, 4;\nand.b32 x, x, 0x3fff;\ncvt.u64.u32 {register}, x;\nor.b64 {register}, {register}, {:#x};\n",
        fixed
    )
}

impl Product<'_> {
    fn case(&self) -> Case {
        let parts: Vec<&str> = self.types.split('.').collect();
        let integer = parts[0] == "s32";
        let registers = if parts[0] == "f16" { self.columns / 4 } else { self.columns / 2 };
        let opcode = format!("wgmma.mma_async.sync.aligned.m64n{}k{}.{}", self.columns, self.depth, self.types);
        let name = format!(
            "{opcode} swizzle {} offsets {:?} transposed {:?} scales {:?}{}{}{}",
            self.swizzle,
            self.offsets,
            self.transposed,
            self.scales,
            if self.a_in_registers { " A in registers" } else { "" },
            if self.accumulate { " accumulating" } else { "" },
            self.label,
        );
        let d: Vec<String> = (0..registers).map(|at| format!("f{at}")).collect();
        let mut body = String::new();
        for (at, register) in d.iter().enumerate() {
            let value = if integer {
                format!("{}", at % 7)
            } else {
                format!(
                    "{:#x}",
                    if parts[0] == "f16" { 0x3c00_4000 } else { 0x3f80_0000 + 0x10_0000 * (at as u32 % 5) }
                )
            };
            let _ = writeln!(body, "mov.b32 {register}, {value};");
        }
        body.push_str(&descriptor("d0", 0, self.offsets[0], self.offsets[1], self.swizzle));
        body.push_str(&descriptor("d1", 16384, self.offsets[2], self.offsets[3], self.swizzle));
        let a = if self.a_in_registers {
            body.push_str("shl.b32 y, tid, 4;\nadd.u32 y, y, sb;\nld.shared.v4.b32 {r0, r1, r2, r3}, [y];\n");
            "{r0, r1, r2, r3}"
        } else {
            "d0"
        };
        let half = matches!(parts[1], "bf16" | "f16");
        let mut tail = if integer { String::new() } else { format!(", {}, {}", self.scales[0], self.scales[1]) };
        if half && self.a_in_registers {
            let _ = write!(tail, ", {}", self.transposed[1]);
        } else if half {
            let _ = write!(tail, ", {}, {}", self.transposed[0], self.transposed[1]);
        }
        let _ = write!(
            body,
            "setp.ne.u32 q, {}, 0;\nwgmma.fence.sync.aligned;\n{opcode} {{{}}}, {a}, d1, q{tail};\n\
             wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n\
             mul.wide.u32 w, tid, {};\nadd.u64 gout, gout, w;\n",
            u32::from(self.accumulate),
            d.join(", "),
            4 * registers
        );
        body = body.replace("setp.ne.u32 q, 1, 0;", "mov.u32 x, 1;\nsetp.ne.u32 q, x, 0;");
        body = body.replace("setp.ne.u32 q, 0, 0;", "mov.u32 x, 0;\nsetp.ne.u32 q, x, 0;");
        for (at, register) in d.iter().enumerate() {
            let _ = writeln!(body, "st.global.b32 [gout+{}], {register};", 4 * at);
        }
        kernel(&name, 128, &body, numbers(&name, parts[1]), 128 * 4 * registers as usize, None)
    }
}

fn wgmma() -> Vec<Case> {
    let base = Product {
        types: "f32.bf16.bf16",
        columns: 64,
        depth: 16,
        swizzle: 0,
        offsets: [128, 256, 128, 256],
        transposed: [0, 0],
        a_in_registers: false,
        scales: [1, 1],
        accumulate: false,
        label: "",
    };
    let mut cases = Vec::new();
    for (swizzle, transposed, offsets) in [
        (0, [0, 0], [128, 256, 128, 256]),
        (0, [0, 0], [1024, 128, 2048, 128]),
        (1, [0, 0], [16, 1024, 16, 1024]),
        (2, [0, 0], [16, 512, 16, 512]),
        (3, [0, 0], [16, 256, 16, 256]),
        (0, [1, 1], [128, 1024, 256, 1024]),
        (0, [1, 1], [1024, 128, 1024, 256]),
        (0, [0, 1], [128, 256, 128, 1024]),
        (0, [1, 0], [128, 1024, 128, 256]),
        (1, [1, 1], [4096, 1024, 2048, 1024]),
        (2, [1, 1], [2048, 512, 1024, 512]),
        (3, [1, 1], [1024, 256, 512, 256]),
        (1, [0, 1], [16, 1024, 1024, 2048]),
        (1, [1, 0], [1024, 2048, 16, 1024]),
    ] {
        cases.push(Product { swizzle, transposed, offsets, ..base }.case());
        cases.push(Product { swizzle, transposed, offsets, columns: 128, ..base }.case());
    }
    for columns in [8, 16, 24, 256] {
        cases.push(Product { columns, ..base }.case());
    }
    cases.push(Product { a_in_registers: true, ..base }.case());
    cases.push(
        Product { a_in_registers: true, transposed: [0, 1], swizzle: 1, offsets: [0, 0, 2048, 1024], ..base }.case(),
    );
    cases.push(Product { scales: [-1, 1], accumulate: true, ..base }.case());
    cases.push(Product { scales: [1, -1], accumulate: true, ..base }.case());
    cases.push(Product { accumulate: true, label: " uniform", ..base }.case());
    cases.push(Product { types: "f32.f16.f16", accumulate: true, label: " uniform", ..base }.case());
    cases.push(Product { types: "f32.f16.f16", ..base }.case());
    cases.push(Product { types: "f16.f16.f16", accumulate: true, ..base }.case());
    cases.push(Product { types: "f16.f16.f16", label: " uniform", ..base }.case());
    for swizzle in [0, 1] {
        let offsets = if swizzle == 0 { [128, 256, 128, 256] } else { [16, 1024, 16, 1024] };
        cases.push(Product { types: "f32.tf32.tf32", depth: 8, swizzle, offsets, ..base }.case());
        cases.push(Product { types: "s32.s8.s8", depth: 32, swizzle, offsets, ..base }.case());
        cases.push(Product { types: "s32.u8.u8", depth: 32, swizzle, offsets, accumulate: true, ..base }.case());
    }
    cases.push(Product { types: "f32.tf32.tf32", depth: 8, accumulate: true, label: " uniform", ..base }.case());
    cases
}
