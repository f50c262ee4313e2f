//! Rounded copies.

use super::par::{elements, for_rows};
use crate::Result;
use crate::cpu::math::narrow;
use crate::layer::round::Round;
use nsa_core::Element;

/// Elements that are rounded at a time.
const PIECE: usize = 1 << 10;

pub fn round<T: Element>(args: Round<'_, T>) -> Result<()> {
    let (x, y) = (elements(args.x.to_host()?), args.y.into_host()?.into_data());
    let whole = y.len() / PIECE * PIECE;
    let (pieces, rest) = y.split_at_mut(whole);
    for_rows(pieces, PIECE, |i, y| narrow(&x[i * PIECE..][..PIECE], y));
    narrow(&x[whole..], rest);
    Ok(())
}
