//! Text to tokens and back: to come.
