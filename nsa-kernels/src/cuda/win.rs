//! Sliding-window attention.

use super::Cuda;
use super::attention;
use super::dense::band_forward;
use crate::op::win::Forward;
use crate::{Element, Result};

pub(crate) fn forward<T: Element>(cuda: &Cuda, args: Forward<'_, T>) -> Result<()> {
    let Forward { config, packing, q, k, v, o, lse } = args;
    let args = attention::Forward { config, packing, q, k: ("k", k), v: ("v", v), o, lse };
    band_forward(cuda, "win::forward", "win_forward", args)
}
