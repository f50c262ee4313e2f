//! Model configuration: to come with the model crates.
