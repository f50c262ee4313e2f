//! PTX text to a syntax tree: everything is read, nothing is understood yet.

mod ast;
mod body;
mod lex;
mod parse;

pub use ast::{
    Address, Function, Guard, Init, Instruction, Kind, Location, Module, Operand, Parameter, Space, Statement, Type,
    Variable,
};

use crate::error::PtxError;

/// Reads a module.
///
/// # Errors
/// The first line that is no PTX of versions 7.0 to 9.x.
pub fn parse(source: &str) -> Result<Module, PtxError> {
    lex::tokens(source).and_then(|tokens| parse::module(&tokens)).map_err(|at| at.in_source(source))
}
