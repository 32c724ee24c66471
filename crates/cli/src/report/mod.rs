//! Reports: one HTML file each, with embedded images.

#[cfg(feature = "demo")]
mod chart;
mod page;

#[cfg(feature = "demo")]
pub use chart::{Series, chart};
pub use page::Page;
