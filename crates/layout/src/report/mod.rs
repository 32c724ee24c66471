//! What is reported about a checkpoint: [`inspection::Inspection`], how it is printed ([`display`]), and what its
//! images cost ([`cost`], from the operations that [`flops`] counts). It uses `detect`, `mapping` and `manifest`;
//! nothing in this crate uses it.

pub(crate) mod cost;
mod display;
mod flops;
pub(crate) mod inspection;
