//! The whole story on the embedded teacher: open, convert, distil, draw, compare, report.

mod carried;
mod edges;
mod embedded;
mod report;
mod story;

pub use story::{DemoSettings, run};
