//! Tests of the library and of the command.

mod checkpoint;
mod command;
mod data;
mod gradients;
mod kit;
mod training;
