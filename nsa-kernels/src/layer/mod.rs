//! Layer operations that training and decoding share.
