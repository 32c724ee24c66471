//! Reports: one HTML file each, with embedded images.

mod page;

pub use page::{Page, Series, chart};
