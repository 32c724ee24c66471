//! Distillation of a tiny FLUX: compared with PyTorch, with one backward pass through the whole model, and with itself
//! after an interruption.

#![allow(clippy::unwrap_used, missing_docs)]

mod backward;
mod memory;
mod parity;
mod samples;
mod support;
mod training;
