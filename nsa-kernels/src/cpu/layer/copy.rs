//! Copies of neighbouring elements.

use super::par::elements;
use crate::Result;
use crate::layer::copy::Piece;
use nsa_core::Element;

pub fn all<T: Element>(copies: Vec<Piece<'_, T>>) -> Result<()> {
    for Piece { source, target } in copies {
        target.into_host()?.into_data().copy_from_slice(elements(source.to_host()?));
    }
    Ok(())
}
