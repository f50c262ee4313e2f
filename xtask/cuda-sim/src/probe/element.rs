//! Kernels that run one instruction on every thread's own input.

use super::Case;
use std::fmt::Write;

/// The width of an operand in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// A predicate; stored as a word.
    P,
    /// 16 bits; stored as a word.
    H,
    /// 32 bits.
    W,
    /// 64 bits.
    D,
}

impl Width {
    fn stride(self) -> usize {
        if self == Self::D { 8 } else { 4 }
    }

    fn class(self) -> &'static str {
        match self {
            Self::P => ".pred",
            Self::H => ".b16",
            Self::W => ".b32",
            Self::D => ".b64",
        }
    }
}

/// An instruction over inputs `i0`, `i1`, … and outputs `o0`, `o1`, …, which are registers of the given widths.
pub struct Element<'a> {
    /// The case's name.
    pub name: &'a str,
    /// The instructions; `t0` … `t9` are words, `q0`, `q1` predicates to use.
    pub body: &'a str,
    /// Inputs.
    pub inputs: &'a [Width],
    /// Outputs.
    pub outputs: &'a [Width],
    /// `.target`
    pub target: &'a str,
}

impl Element<'_> {
    /// The case for rows of inputs, padded to whole warps with its first row.
    pub fn case(&self, rows: &[Vec<u64>]) -> Case {
        let threads = rows.len().next_multiple_of(32).max(32);
        let block = if threads.is_multiple_of(128) { 128 } else { 32 };
        let (in_stride, out_stride) = (stride(self.inputs), stride(self.outputs));
        let mut input = Vec::with_capacity(threads * in_stride);
        for thread in 0..threads {
            let row = rows.get(thread).unwrap_or(&rows[0]);
            let mut bytes = Vec::new();
            for (width, value) in self.inputs.iter().zip(row) {
                align(&mut bytes, width.stride());
                bytes.extend_from_slice(&value.to_le_bytes()[..width.stride()]);
            }
            align(&mut bytes, in_stride.max(1));
            input.extend_from_slice(&bytes);
        }
        Case {
            name: self.name.to_owned(),
            ptx: self.ptx(in_stride, out_stride),
            grid: (threads / block) as u32,
            block: block as u32,
            shared: 0,
            input,
            output: threads * out_stride,
            map: None,
        }
    }

    fn ptx(&self, in_stride: usize, out_stride: usize) -> String {
        let version = if self.target == "sm_90a" { "8.0" } else { "7.8" };
        let mut text = format!(
            ".version {version}\n.target {}\n.address_size 64\n\
             .visible .entry k(.param .u64 pin, .param .u64 pout)\n{{\n\
             .reg .b64 from, to, step;\n.reg .b32 x, y, z;\n.reg .b32 t<10>;\n.reg .pred q<2>;\n",
            self.target
        );
        for (letter, widths) in [('i', self.inputs), ('o', self.outputs)] {
            for (at, width) in widths.iter().enumerate() {
                let _ = writeln!(text, ".reg {} {letter}{at};", width.class());
            }
        }
        let _ = write!(
            text,
            "mov.u32 x, %ctaid.x;\nmov.u32 y, %ntid.x;\nmov.u32 z, %tid.x;\nmad.lo.u32 x, x, y, z;\n\
             ld.param.u64 from, [pin];\nld.param.u64 to, [pout];\n\
             mul.wide.u32 step, x, {in_stride};\nadd.u64 from, from, step;\n\
             mul.wide.u32 step, x, {out_stride};\nadd.u64 to, to, step;\n"
        );
        let mut offset = 0;
        for (at, width) in self.inputs.iter().enumerate() {
            offset = offset_of(offset, *width);
            let _ = match width {
                Width::P => writeln!(text, "ld.global.b32 z, [from+{offset}];\nsetp.ne.u32 i{at}, z, 0;"),
                Width::H => writeln!(text, "ld.global.b32 z, [from+{offset}];\ncvt.u16.u32 i{at}, z;"),
                Width::W => writeln!(text, "ld.global.b32 i{at}, [from+{offset}];"),
                Width::D => writeln!(text, "ld.global.b64 i{at}, [from+{offset}];"),
            };
            offset += width.stride();
        }
        let _ = writeln!(text, "{}", self.body);
        offset = 0;
        for (at, width) in self.outputs.iter().enumerate() {
            offset = offset_of(offset, *width);
            let _ = match width {
                Width::P => writeln!(text, "selp.u32 z, 1, 0, o{at};\nst.global.b32 [to+{offset}], z;"),
                Width::H => writeln!(text, "cvt.u32.u16 z, o{at};\nst.global.b32 [to+{offset}], z;"),
                Width::W => writeln!(text, "st.global.b32 [to+{offset}], o{at};"),
                Width::D => writeln!(text, "st.global.b64 [to+{offset}], o{at};"),
            };
            offset += width.stride();
        }
        text.push_str("ret;\n}\n");
        text
    }
}

fn align(bytes: &mut Vec<u8>, to: usize) {
    bytes.resize(bytes.len().next_multiple_of(to), 0);
}

fn offset_of(offset: usize, width: Width) -> usize {
    offset.next_multiple_of(width.stride())
}

/// Bytes of a thread's row.
fn stride(widths: &[Width]) -> usize {
    let end = widths.iter().fold(0, |at, width| offset_of(at, *width) + width.stride());
    if widths.contains(&Width::D) { end.next_multiple_of(8) } else { end }
}
