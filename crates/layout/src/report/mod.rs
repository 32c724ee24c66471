//! What is said of a checkpoint: [`inspection::Inspection`], how it is printed, and what its pictures cost.

pub(crate) mod cost;
mod display;
mod flops;
pub(crate) mod inspection;
