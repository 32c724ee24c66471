//! [`CostEstimate`]: what a picture will cost, counted from the shapes of the weights. Nothing here is measured: how fast a
//! machine does it is not said.
//!
//! One evaluation of the transformer on N image tokens and T text tokens takes 2 operations for every weight of a linear
//! layer or convolution and every token, pixel or picture that the layer acts on, and 4 w for every pair of tokens that
//! attend to each other in a layer of width w. Where image and text attend together, full attention has (N + T)^2 pairs;
//! CLEAR has those of image tokens nearer than the radius r (dx^2 + dy^2 < r^2, counted exactly, with the picture's
//! borders), N T from image to text and T (N + T) from text (CLEAR, section 3.2). Attention of the image to itself alone
//! has N^2 or the near ones, attention of the image to the text N T in both. Norms, positions, softmax and
//! activations are left out, as papers do.
//!
//! So counted, one attention layer of FLUX.1 [dev] at 1024 pixels takes 260.9 Gflop, and 63.5, 86.6 and 154.1 with CLEAR
//! of radius 8, 16 and 32. The paper prints the same but for 80.6 at radius 16, which its own table of TFLOPs (0.09)
//! contradicts.
//!
//! Memory is the weights as they are computed with, and 15 activations of w numbers a token in f32, about what one block
//! holds at its widest. Attention of either kind is computed in tiles and holds no matrix of pairs.

use crate::detect::Identified;
use crate::report::flops::FlopCount;
use serde::Serialize;

/// Side of the smallest picture, where nothing tells what the model was trained on.
const USUAL_SIDE: usize = 1024;
/// No larger pictures are drawn.
const MOST_SIDE: usize = 1 << 15;
/// The smallest picture's side times these.
const TIMES: [usize; 4] = [1, 2, 4, 8];
/// Radii of the paper.
const RADII: [usize; 3] = [8, 16, 32];
const ACTIVATIONS: usize = 15;

/// An estimate for one picture size; nothing in it was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CostEstimate {
    /// Pixels along a side of the square picture.
    pub side_pixels: usize,
    /// Image tokens.
    pub image_tokens: usize,
    /// Text tokens.
    pub text_tokens: usize,
    /// Bytes of weights and activations.
    pub memory_bytes: u64,
    /// Operations of one evaluation with full attention, in units of 10^12.
    pub full_teraflop_per_evaluation: f64,
    /// The same made linear.
    pub clear: Vec<ClearCost>,
}

/// What one evaluation costs with CLEAR attention.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClearCost {
    /// Radius of the window.
    pub radius_tokens: usize,
    /// Operations, in units of 10^12.
    pub teraflop_per_evaluation: f64,
    /// How many times as many full attention takes.
    pub full_over_clear: f64,
}

impl CostEstimate {
    /// Estimates for the size a model was trained on and larger ones that it can draw, where its weights take
    /// `weight_bytes`; none if the family's manifest does not say what its weights act on.
    pub fn of(identified: &Identified, weight_bytes: u64) -> Vec<Self> {
        let (manifest, sizes) = (identified.manifest(), identified.sizes());
        let work = FlopCount::of(manifest, sizes);
        let side = identified.pixels_per_token();
        let first = manifest.trained_side(sizes).unwrap_or(USUAL_SIDE).clamp(side, MOST_SIDE.max(side));
        let most = manifest.largest_side(sizes).unwrap_or(MOST_SIDE).max(first);
        let sides = TIMES.map(|times| first.saturating_mul(times)).into_iter();
        let drawn = sides.filter(|side| *side <= most && work.is_known());
        drawn.map(|side| Self::at(side, identified, &work, weight_bytes)).collect()
    }

    fn at(side: usize, identified: &Identified, work: &FlopCount, weight_bytes: u64) -> Self {
        let edge = side / identified.pixels_per_token();
        let text = identified.variant.defaults.text_tokens;
        let picture = ImageCost { edge, text, pixels: side as f64 * side as f64 };
        let full = picture.teraflop(work, (edge as f64).powi(4));
        let linear = |radius| {
            let clear = picture.teraflop(work, near_pairs(edge, radius) as f64);
            ClearCost { radius_tokens: radius, teraflop_per_evaluation: clear, full_over_clear: full / clear }
        };
        let width = identified.size("width").unwrap_or(0);
        let tokens = edge.saturating_mul(edge);
        let activations = tokens.saturating_add(text).saturating_mul(width).saturating_mul(ACTIVATIONS * 4);
        Self {
            side_pixels: side,
            image_tokens: tokens,
            text_tokens: text,
            memory_bytes: weight_bytes.saturating_add(activations as u64),
            full_teraflop_per_evaluation: full,
            clear: RADII.map(linear).into(),
        }
    }
}

/// What an evaluation is of.
struct ImageCost {
    /// Image tokens along a side.
    edge: usize,
    text: usize,
    pixels: f64,
}

impl ImageCost {
    /// 10^12 operations where `near` pairs of image tokens attend to each other.
    fn teraflop(&self, work: &FlopCount, near: f64) -> f64 {
        let (image, text) = ((self.edge as f64).powi(2), self.text as f64);
        let weights = work.image_token * image + work.text_token * text + work.pixel * self.pixels + work.picture;
        let all = near + image * text + text * (image + text);
        let pairs = work.attends_all * all + work.attends_image * near + work.attends_text * image * text;
        (2.0 * weights + 4.0 * pairs) / 1e12
    }
}

/// Pairs of tokens of an `edge` x `edge` picture that are nearer to each other than `radius`.
fn near_pairs(edge: usize, radius: usize) -> u64 {
    let offsets = |reach: usize| (0..edge.min(reach)).map(|at| (at, if at == 0 { 1 } else { 2 }));
    let pairs = offsets(radius).flat_map(|(dx, across)| offsets(radius).map(move |(dy, down)| (dx, dy, across * down)));
    let near = pairs.filter(|(dx, dy, _)| dx * dx + dy * dy < radius * radius);
    near.map(|(dx, dy, signs)| signs * ((edge - dx) * (edge - dy)) as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_counted_as_one_by_one() {
        for (edge, radius) in [(1, 8), (5, 1), (7, 3), (9, 4), (12, 16), (20, 8)] {
            let tokens = || (0..edge * edge).map(|at| ((at / edge) as i64, (at % edge) as i64));
            let near =
                |(a, b): &((i64, i64), (i64, i64))| (a.0 - b.0).pow(2) + (a.1 - b.1).pow(2) < (radius * radius) as i64;
            let counted = tokens().flat_map(|a| tokens().map(move |b| (a, b))).filter(near).count();
            assert_eq!(near_pairs(edge, radius), counted as u64, "{edge} {radius}");
        }
    }

    /// Gflop of one attention layer of FLUX.1 [dev] at 1K, 2K, 4K and 8K, as the paper prints them; at 1K and radius 16 one
    /// of its tables has 80.6.
    #[test]
    fn a_layer_of_attention_takes_what_the_paper_says() {
        let layer = FlopCount { attends_all: 3072.0, ..FlopCount::default() };
        let printed = [
            (64, 260.9, [63.5, 86.6, 154.1]),
            (128, 3510.0, [250.0, 350.0, 720.0]),
            (256, 53_600.0, [980.0, 1430.0, 3140.0]),
            (512, 847_700.0, [3920.0, 5790.0, 13_090.0]),
        ];
        for (edge, full, clear) in printed {
            let picture = ImageCost { edge, text: 512, pixels: 0.0 };
            let close = |counted: f64, printed: f64| {
                assert!((counted * 1e3 / printed - 1.0).abs() < 0.02, "{edge}: {counted} Tflop, not {printed} Gflop");
            };
            close(picture.teraflop(&layer, (edge as f64).powi(4)), full);
            for (radius, printed) in RADII.into_iter().zip(clear) {
                close(picture.teraflop(&layer, near_pairs(edge, radius) as f64), printed);
            }
        }
    }
}
