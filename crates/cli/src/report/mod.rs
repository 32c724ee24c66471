//! Reports for a person: one HTML file with its pictures inside.

mod page;

pub use page::{Page, Series, chart};
