//! A kernel's text with everything that it includes: one self-contained C++ file, the same for NVRTC and nvcc.
//!
//! Kernels include three kinds of header, none of which is a file of the machine: the shared ones of this library
//! (`element.cuh` …), `params.cuh` with the kernel's argument structs, made from the Rust structs, and `config.cuh` with the
//! constants of the call. No header of the CUDA toolkit is needed.

use super::geometry::Unit;
use super::params::{Cpp, Grad, Stored, Weight};
use nsa_core::{DType, NsaConfig};
use std::fmt::Write as _;

/// The constant that says whether warps multiply together.
const WARPGROUPS: &str = "WARPGROUPS";

/// The headers that kernels share.
const HEADERS: &[(&str, &str)] = &[
    ("array.cuh", include_str!("kernels/array.cuh")),
    ("band.cuh", include_str!("kernels/band.cuh")),
    ("band_bwd.cuh", include_str!("kernels/band_bwd.cuh")),
    ("band_fwd.cuh", include_str!("kernels/band_fwd.cuh")),
    ("bulk.cuh", include_str!("kernels/bulk.cuh")),
    ("decode.cuh", include_str!("kernels/decode.cuh")),
    ("decode_select.cuh", include_str!("kernels/decode_select.cuh")),
    ("element.cuh", include_str!("kernels/element.cuh")),
    ("flash.cuh", include_str!("kernels/flash.cuh")),
    ("gate.cuh", include_str!("kernels/gate.cuh")),
    ("grad.cuh", include_str!("kernels/grad.cuh")),
    ("inverse.cuh", include_str!("kernels/inverse.cuh")),
    ("joined.cuh", include_str!("kernels/joined.cuh")),
    ("mma.cuh", include_str!("kernels/mma.cuh")),
    ("product.cuh", include_str!("kernels/product.cuh")),
    ("reduce.cuh", include_str!("kernels/reduce.cuh")),
    ("select.cuh", include_str!("kernels/select.cuh")),
    ("sequence.cuh", include_str!("kernels/sequence.cuh")),
    ("span.cuh", include_str!("kernels/span.cuh")),
    ("step.cuh", include_str!("kernels/step.cuh")),
    ("tile.cuh", include_str!("kernels/tile.cuh")),
    ("turned.cuh", include_str!("kernels/turned.cuh")),
    ("unit.cuh", include_str!("kernels/unit.cuh")),
    ("wgmma.cuh", include_str!("kernels/wgmma.cuh")),
];

/// A source file of kernels.
#[derive(Debug)]
pub struct Program {
    /// Its name, such as `gate.cu`.
    pub file: &'static str,
    /// Its text.
    pub text: &'static str,
    /// Makes the C++ declarations of its kernels' arguments.
    pub(crate) params: &'static [fn() -> String],
}

/// What a call bakes into a kernel: names of element types, and numbers. The same constants are the same machine code.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Constants {
    types: Vec<(&'static str, DType)>,
    values: Vec<(&'static str, i64)>,
}

impl Constants {
    /// The type of the tensors, `Element` in kernels.
    pub fn new(element: DType) -> Self {
        Self { types: vec![(Stored::NAME, element)], values: Vec::new() }
    }

    /// With the sizes of the operator.
    pub fn config(mut self, config: &NsaConfig) -> Self {
        let values = [
            ("HEADS", config.num_heads()),
            ("KV_HEADS", config.num_kv_heads()),
            ("GROUP", config.group_size()),
            ("HEAD_DIM_QK", config.head_dim_qk()),
            ("HEAD_DIM_V", config.head_dim_v()),
            ("COMPRESS_BLOCK", config.compress_block()),
            ("COMPRESS_STRIDE", config.compress_stride()),
            ("SELECT_BLOCK", config.select_block()),
            ("SELECT_COUNT", config.select_count()),
            ("SELECT_INITIAL", config.select_initial()),
            ("SELECT_LOCAL", config.select_local()),
            ("WINDOW", config.window()),
        ];
        self.values.extend(values.map(|(name, value)| (name, value as i64)));
        self
    }

    /// With a number.
    pub fn with(mut self, name: &'static str, value: usize) -> Self {
        self.values.push((name, value as i64));
        self
    }

    /// With a number that may be negative.
    pub fn with_signed(mut self, name: &'static str, value: i64) -> Self {
        self.values.push((name, value));
        self
    }

    /// With who makes products of matrices.
    pub(crate) fn unit(self, unit: Unit) -> Self {
        self.with(WARPGROUPS, usize::from(unit == Unit::Warpgroup))
    }

    /// Whether warps multiply together, which devices of compute capability 9.0 alone can.
    pub(super) fn warpgroups(&self) -> bool {
        self.values.contains(&(WARPGROUPS, 1))
    }

    /// With another name of an element type.
    pub fn with_type(mut self, name: &'static str, dtype: DType) -> Self {
        self.types.push((name, dtype));
        self
    }

    /// The element type of that name.
    pub fn dtype(&self, name: &str) -> Option<DType> {
        self.types.iter().find(|(other, _)| *other == name).map(|&(_, dtype)| dtype)
    }

    /// `config.cuh`.
    fn header(&self) -> String {
        let mut text = String::new();
        // A program's structs name all types, a call has those of its kernels.
        for name in [Stored::NAME, Weight::NAME, Grad::NAME] {
            let _ = writeln!(text, "using {name} = {};", cpp(self.dtype(name).unwrap_or(DType::F32)));
        }
        for (name, value) in &self.values {
            match i32::try_from(*value) {
                Ok(_) => writeln!(text, "constexpr int {name} = {value};"),
                Err(_) => writeln!(text, "constexpr long long {name} = {value}ll;"),
            }
            .expect("a String takes everything");
        }
        text
    }
}

/// The name of an element type in kernels.
fn cpp(dtype: DType) -> &'static str {
    match dtype {
        DType::Bf16 => "Bf16",
        DType::F16 => "F16",
        DType::F32 => "float",
        DType::F64 => "double",
    }
}

impl Program {
    /// The whole text: each header stands where it is included first, with the lines of its own file.
    ///
    /// # Panics
    /// If an included header does not exist: a mistake in a kernel.
    pub fn source(&self, constants: &Constants) -> String {
        let mut out = String::new();
        self.append(&mut out, self.file, self.text, constants, &mut Vec::new());
        out
    }

    fn append<'h>(
        &'h self,
        out: &mut String,
        name: &str,
        text: &'h str,
        constants: &Constants,
        included: &mut Vec<&'h str>,
    ) {
        let _ = writeln!(out, "#line 1 \"{name}\"");
        for (at, line) in text.lines().enumerate() {
            let header = line.trim().strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
            match header {
                Some(header) if !included.contains(&header) => {
                    included.push(header);
                    self.include(out, header, constants, included);
                    let _ = writeln!(out, "#line {} \"{name}\"", at + 2);
                }
                _ if header.is_some() || line.trim() == "#pragma once" => out.push('\n'),
                _ => {
                    let _ = writeln!(out, "{line}");
                }
            }
        }
    }

    fn include<'h>(&'h self, out: &mut String, header: &str, constants: &Constants, included: &mut Vec<&'h str>) {
        let generated = match header {
            "config.cuh" => constants.header(),
            "params.cuh" => self.params.iter().map(|declaration| declaration()).collect(),
            _ => {
                let found = HEADERS.iter().find(|(name, _)| *name == header);
                let (name, text) = found.unwrap_or_else(|| panic!("{}: no header {header}", self.file));
                return self.append(out, name, text, constants, included);
            }
        };
        let _ = write!(out, "#line 1 \"{header}\"\n{generated}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_stand_where_they_are_included_first() {
        let program = Program {
            file: "k.cu",
            text: "#include \"config.cuh\"\n#include \"element.cuh\"\n#include \"config.cuh\"\nint last;\n",
            params: &[],
        };
        let source = program.source(&Constants::new(DType::Bf16).with("WIDTH", 3));
        assert_eq!(source.matches("constexpr int WIDTH = 3;").count(), 1);
        assert_eq!(source.matches("struct Bf16").count(), 1);
        assert!(source.ends_with("#line 3 \"k.cu\"\n\nint last;\n"), "{source}");
        assert!(!source.contains("#include") && !source.contains("#pragma once"));
    }
}
