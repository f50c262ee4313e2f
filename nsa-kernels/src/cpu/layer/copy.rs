//! Copies of neighbouring elements.

use super::par::elements;
use crate::Result;
use crate::layer::copy::Copy;
use nsa_core::Element;

pub fn all<T: Element>(copies: Vec<Copy<'_, T>>) -> Result<()> {
    for Copy { source, target } in copies {
        target.into_host()?.into_data().copy_from_slice(elements(source.to_host()?));
    }
    Ok(())
}
