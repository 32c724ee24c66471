//! The whole story on the embedded teacher: open, convert, distil, draw, compare, report.

mod edges;
mod embedded;
mod report;
mod run;
mod transfer;

pub use run::{DemoSettings, run};
