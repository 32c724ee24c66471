//! Distillation of a tiny FLUX: against PyTorch, against plain backward, and against itself after an interruption.

#![allow(clippy::unwrap_used, missing_docs)]

mod backward;
mod memory;
mod parity;
mod support;
mod training;
