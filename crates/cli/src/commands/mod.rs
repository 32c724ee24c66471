//! One file per command. Each takes its arguments, calls the libraries, and prints the result.

pub mod bench;
pub mod compare;
pub mod convert;
#[cfg(feature = "demo")]
pub mod demo;
pub mod distill;
pub mod export;
pub mod forward;
pub mod generate;
pub mod inspect;
pub mod patch;
pub mod plugins;
pub mod transfer;
pub mod verify;
