//! The types that tensors of operations may have, and where the operations are compiled for them.

use crate::Result;
use crate::cpu::{self, Cpu};
use crate::op::{cmp, compress, decode, dense, gate, slc, win};
use half::{bf16, f16};

/// A type that tensors of operations may have: f32, bf16, f16, f64.
///
/// No other crate implements it: the operations are compiled here for each of the types, for every instruction set, and
/// not again in each crate that calls them.
pub trait Element: nsa_core::Element {
    #[doc(hidden)]
    fn compress_forward(cpu: &Cpu, args: compress::Forward<'_, Self>) -> Result<()>;
    #[doc(hidden)]
    fn compress_backward(cpu: &Cpu, args: compress::Backward<'_, Self>) -> Result<()>;
    #[doc(hidden)]
    fn cmp_forward(cpu: &Cpu, args: cmp::Forward<'_, Self>) -> Result<()>;
    #[doc(hidden)]
    fn cmp_backward(cpu: &Cpu, args: cmp::Backward<'_, Self>) -> Result<()>;
    #[doc(hidden)]
    fn slc_forward(cpu: &Cpu, args: slc::Forward<'_, Self>) -> Result<()>;
    #[doc(hidden)]
    fn slc_backward(cpu: &Cpu, args: slc::Backward<'_, Self>) -> Result<()>;
    #[doc(hidden)]
    fn win_forward(cpu: &Cpu, args: win::Forward<'_, Self>) -> Result<()>;
    #[doc(hidden)]
    fn win_backward(cpu: &Cpu, args: win::Backward<'_, Self>) -> Result<()>;
    #[doc(hidden)]
    fn dense_forward(cpu: &Cpu, args: dense::Forward<'_, Self>) -> Result<()>;
    #[doc(hidden)]
    fn dense_backward(cpu: &Cpu, args: dense::Backward<'_, Self>) -> Result<()>;
    #[doc(hidden)]
    fn gate_forward(cpu: &Cpu, args: gate::Forward<'_, Self>) -> Result<()>;
    #[doc(hidden)]
    fn gate_backward(cpu: &Cpu, args: gate::Backward<'_, Self>) -> Result<()>;
    #[doc(hidden)]
    fn decode_step(cpu: &Cpu, args: decode::Step<'_, Self>) -> Result<decode::RowsRead>;
}

macro_rules! compile {
    ($type:ty: $($name:ident = $module:ident::$function:ident($args:ident) -> $output:ty;)*) => {
        impl Element for $type {
            $(#[inline(never)]
            fn $name(cpu: &Cpu, args: $module::$args<'_, Self>) -> Result<$output> {
                cpu::$module::$function(cpu, args)
            })*
        }
    };
    ($type:ty) => {
        compile! { $type:
            compress_forward = compress::forward(Forward) -> ();
            compress_backward = compress::backward(Backward) -> ();
            cmp_forward = cmp::forward(Forward) -> ();
            cmp_backward = cmp::backward(Backward) -> ();
            slc_forward = slc::forward(Forward) -> ();
            slc_backward = slc::backward(Backward) -> ();
            win_forward = win::forward(Forward) -> ();
            win_backward = win::backward(Backward) -> ();
            dense_forward = dense::forward(Forward) -> ();
            dense_backward = dense::backward(Backward) -> ();
            gate_forward = gate::forward(Forward) -> ();
            gate_backward = gate::backward(Backward) -> ();
            decode_step = decode::step(Step) -> decode::RowsRead;
        }
    };
}

compile!(f32);
compile!(f64);
compile!(bf16);
compile!(f16);
