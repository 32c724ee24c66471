//! [`Estimate`]: what a picture will cost in memory and time, by a formula that fits on a page. Not measured.
//!
//! With N image tokens, T text tokens, width w and depth L (all blocks), one evaluation takes about
//! 24 (N + T) w^2 L operations in linear layers (12 w^2 weights a block) and 4 w L for every pair of tokens that
//! attend to each other. Full attention has (N + T)^2 pairs; CLEAR has N min(N, pi r^2) pairs of image tokens,
//! N T from image to text and T (N + T) from text (the window of its equation 3). Memory is the weights as stored
//! and 15 activations of w numbers a token in f32, about what one block holds at its widest.

use crate::detect::Identified;
use serde::Serialize;
use std::f64::consts::PI;

/// Side lengths, in pixels, that are estimated.
const SIDES: [usize; 3] = [1024, 2048, 4096];
/// Radius of the estimate, the default of conversion.
const RADIUS: f64 = 16.0;
const ACTIVATIONS: usize = 15;

/// An estimate for one picture size; nothing in it was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// Pixels along a side of the square picture.
    pub side: usize,
    /// Image tokens.
    pub tokens: usize,
    /// Bytes of weights and activations.
    pub memory_bytes: u64,
    /// Operations of one evaluation with full attention, in units of 10^12.
    pub full_teraflop: f64,
    /// The same with CLEAR, radius 16.
    pub clear_teraflop: f64,
    /// Seconds for all steps with full attention on a machine that sustains 10^12 operations a second.
    pub full_seconds_at_1_teraflops: f64,
    /// The same with CLEAR, radius 16.
    pub clear_seconds_at_1_teraflops: f64,
}

impl Estimate {
    /// Estimates for the usual sizes of a model whose weights take `weight_bytes`.
    pub fn of(identified: &Identified, weight_bytes: u64) -> Vec<Self> {
        SIDES.into_iter().map(|side| Self::at(side, identified, weight_bytes)).collect()
    }

    fn at(side: usize, identified: &Identified, weight_bytes: u64) -> Self {
        let defaults = identified.variant.defaults;
        let tokens = (side / identified.pixels_per_token()).pow(2);
        let width = identified.size("width").unwrap_or(0);
        let depth = identified.depths().values().sum::<usize>() as f64;
        let (image, text, w) = (tokens as f64, defaults.text_tokens as f64, width as f64);
        let linear = 24.0 * (image + text) * w * w * depth;
        let attention = |pairs: f64| (linear + 4.0 * w * depth * pairs) / 1e12;
        let full = attention((image + text).powi(2));
        let near = image * image.min(PI * RADIUS * RADIUS) + image * text;
        let clear = attention(near + text * (image + text));
        let activations = (tokens + defaults.text_tokens).saturating_mul(width).saturating_mul(ACTIVATIONS * 4);
        Self {
            side,
            tokens,
            memory_bytes: weight_bytes.saturating_add(activations as u64),
            full_teraflop: full,
            clear_teraflop: clear,
            full_seconds_at_1_teraflops: full * defaults.steps as f64,
            clear_seconds_at_1_teraflops: clear * defaults.steps as f64,
        }
    }
}
