//! The demo: converts and distils the embedded model, compares teacher and students, and writes a report.

mod edges;
mod embedded;
mod report;
mod run;
mod transfer;

pub use run::{DemoSettings, run};
