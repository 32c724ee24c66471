//! [`CostEstimate`]: the operations and memory of generating an image, counted from the shapes of the weights. Nothing
//! here is measured; how long it takes depends on the machine.
//!
//! One evaluation of the transformer on N image tokens and T text tokens takes 2 operations for every weight of a
//! linear layer or convolution and every token, pixel or image that the layer is applied to, and 4w for every pair of
//! tokens that attend to each other in a layer of width w. In joint attention of image and text, full attention has
//! `(N+T)^2` pairs; CLEAR has the pairs of image tokens nearer than the radius r (`dx^2+dy^2<r^2`, counted exactly,
//! with the image's borders), `NT` from image to text and `T(N+T)` from text (CLEAR, section 3.2). Self-attention of
//! the image has `N^2` pairs or the near ones, cross-attention to the text `NT` in both cases. Norms, position
//! embeddings, softmax and activations are left out, as in the literature.
//!
//! Counted this way, one attention layer of FLUX.1 dev at 1024 pixels takes 260.9 Gflop, and 63.5, 86.6 and 154.1 with
//! CLEAR of radius 8, 16 and 32. The paper prints the same except for 80.6 at radius 16, which contradicts its own
//! table of TFLOPs (0.09).
//!
//! Memory is the weights as they are held, plus [`activation_bytes`]. Attention of either kind is computed in tiles and
//! stores no matrix of pairs.

use crate::detect::Identified;
use crate::report::flops::FlopCount;
use serde::Serialize;

/// Side in pixels of the smallest image if the training size is unknown.
const USUAL_SIDE: usize = 1024;
/// No larger images are estimated; the numbers stay far from overflow.
const MOST_SIDE: usize = 1 << 15;
/// Sides of the images, in multiples of the smallest.
const MULTIPLES: [usize; 4] = [1, 2, 4, 8];
/// Radii of the paper.
const RADII: [usize; 3] = [8, 16, 32];
/// Tensors of width w that a block holds at a time: the state, its norm, queries, keys and values, and the output.
/// Measured on FLUX's blocks, 3072 wide, at 2048 and 4096 px: 5.9 for each token more.
const STATE_TENSORS: usize = 6;
/// The same of its MLP, which is computed for some tokens at a time: hidden values before and after the activation,
/// those joined with attention, and the output.
const MLP_TENSORS: usize = 14;
/// Values of the widest of these, which bound the number of tokens.
const MLP_VALUES: usize = 1 << 27;
const MLP_WIDTH: usize = 5;

/// An estimate for one image size; nothing in it was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CostEstimate {
    /// Side of the square image in pixels.
    pub side_pixels: usize,
    /// Image tokens.
    pub image_tokens: usize,
    /// Text tokens.
    pub text_tokens: usize,
    /// Bytes of weights and activations.
    pub memory_bytes: u64,
    /// Operations of one evaluation with full attention, in units of 10^12.
    pub full_teraflop_per_evaluation: f64,
    /// The same with CLEAR attention, by radius.
    pub clear: Vec<ClearCost>,
}

/// What the pipeline around a transformer says about the sizes of its images and prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PipelineScale {
    /// Side in pixels of the images that it was trained on, if it is known.
    pub native_side: Option<usize>,
    /// Side in pixels of a token.
    pub pixels_per_token: usize,
    /// Text tokens of a prompt; 0 if the family takes no text.
    pub text_tokens: usize,
}

impl PipelineScale {
    /// What is usual in the family.
    pub fn usual(identified: &Identified) -> Self {
        Self {
            native_side: None,
            pixels_per_token: identified.pixels_per_token(),
            text_tokens: identified.variant.defaults.text_tokens,
        }
    }

    /// Side in pixels of the images that the model was trained on, or of those that are usual.
    pub fn side(&self, identified: &Identified) -> usize {
        identified.manifest().trained_side(identified.sizes()).or(self.native_side).unwrap_or(USUAL_SIDE)
    }
}

/// What distilling a model takes with the usual settings; not measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DistillationEstimate {
    /// Peak memory in bytes.
    pub memory_bytes: u64,
    /// Samples per step.
    pub batch: usize,
    /// Side of the square samples in pixels.
    pub side_pixels: usize,
}

/// The cost of one evaluation with CLEAR attention.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClearCost {
    /// Radius of the window in tokens.
    pub radius_tokens: usize,
    /// Operations, in units of 10^12.
    pub teraflop_per_evaluation: f64,
    /// The operations of full attention divided by these.
    pub full_over_clear: f64,
}

/// Peak bytes of the activations of an evaluation of `tokens` tokens of all samples, in a model of this width and in
/// values of so many bytes.
pub fn activation_bytes(tokens: usize, width: usize, value_bytes: usize) -> u64 {
    let at_a_time = tokens.min(MLP_VALUES / (MLP_WIDTH * width).max(1));
    let tensors = tokens.saturating_mul(STATE_TENSORS).saturating_add(at_a_time.saturating_mul(MLP_TENSORS));
    tensors.saturating_mul(width).saturating_mul(value_bytes) as u64
}

/// Weights of a model, for an estimate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightMemory {
    /// Bytes that they take.
    pub bytes: u64,
    /// Bytes of a value of the dtype that is computed in.
    pub value_bytes: usize,
}

impl CostEstimate {
    /// Estimates for the size that a model was trained on and for larger ones that it can generate. Empty if the
    /// family's manifest does not state what its weights are applied to.
    pub fn of(identified: &Identified, weights: WeightMemory, scale: PipelineScale) -> Vec<Self> {
        let manifest = identified.manifest();
        let sizes = identified.sizes();
        let flops = FlopCount::of(manifest, sizes);
        let token = scale.pixels_per_token;
        let first = scale.side(identified).clamp(token, MOST_SIDE.max(token));
        let most = manifest.largest_side(sizes).unwrap_or(MOST_SIDE).max(first);
        let sides = MULTIPLES.map(|multiple| first.saturating_mul(multiple)).into_iter();
        let possible = sides.filter(|side| *side <= most && flops.is_known());
        possible.map(|side| Self::at(side, scale, identified, &flops, weights)).collect()
    }

    fn at(
        side: usize,
        scale: PipelineScale,
        identified: &Identified,
        flops: &FlopCount,
        weights: WeightMemory,
    ) -> Self {
        let edge = side / scale.pixels_per_token;
        let text = scale.text_tokens;
        let tokens = edge.saturating_mul(edge);
        let image = EstimatedImage { tokens: tokens as f64, text, pixels: side as f64 * side as f64 };
        let full = image.teraflop(flops, (edge as f64).powi(4));
        let with_radius = |radius| {
            let clear = image.teraflop(flops, near_pairs(edge, radius) as f64);
            ClearCost { radius_tokens: radius, teraflop_per_evaluation: clear, full_over_clear: full / clear }
        };
        let width = identified.size("width").unwrap_or(0);
        let activations = activation_bytes(tokens.saturating_add(text), width, weights.value_bytes);
        Self {
            side_pixels: side,
            image_tokens: tokens,
            text_tokens: text,
            memory_bytes: weights.bytes.saturating_add(activations),
            full_teraflop_per_evaluation: full,
            clear: RADII.map(with_radius).into(),
        }
    }
}

/// 10^12 operations of one evaluation of the model on an image of `tokens` and `pixels` with a prompt of `text` tokens, in which
/// `near` pairs of image tokens attend to each other. `None` if the family's manifest does not state what its weights are applied to.
pub fn evaluation_teraflop(
    identified: &Identified,
    tokens: usize,
    pixels: usize,
    text: usize,
    near: u64,
) -> Option<f64> {
    let flops = FlopCount::of(identified.manifest(), identified.sizes());
    let image = EstimatedImage { tokens: tokens as f64, text, pixels: pixels as f64 };
    flops.is_known().then(|| image.teraflop(&flops, near as f64))
}

/// Parameters of the projections of the attention layers that are distilled, about: four of width x width in each.
pub fn attention_parameters(identified: &Identified) -> f64 {
    let flops = FlopCount::of(identified.manifest(), identified.sizes());
    let width = identified.size("width").unwrap_or(0) as f64;
    4.0 * width * (flops.attends_all + flops.attends_image)
}

/// The sizes that the cost of an evaluation depends on.
struct EstimatedImage {
    /// Image tokens.
    tokens: f64,
    /// Text tokens.
    text: usize,
    /// Pixels of the image.
    pixels: f64,
}

impl EstimatedImage {
    /// 10^12 operations of an evaluation in which `near` pairs of image tokens attend to each other.
    fn teraflop(&self, flops: &FlopCount, near: f64) -> f64 {
        let image = self.tokens;
        let text = self.text as f64;
        let weights = flops.image_token * image + flops.text_token * text + flops.pixel * self.pixels + flops.image;
        let all = near + image * text + text * (image + text);
        let pairs = flops.attends_all * all + flops.attends_image * near + flops.attends_text * image * text;
        (2.0 * weights + 4.0 * pairs) / 1e12
    }
}

/// Ordered pairs of tokens of an `edge` x `edge` image that are nearer to each other than `radius`, by their offsets:
/// (dx, dy) occurs at (edge - dx) (edge - dy) places, and once for each sign.
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
    fn pairs_are_as_many_as_a_search_finds() {
        for (edge, radius) in [(1, 8), (5, 1), (7, 3), (9, 4), (12, 16), (20, 8)] {
            let tokens = || (0..edge * edge).map(|at| ((at / edge) as i64, (at % edge) as i64));
            let near =
                |(a, b): &((i64, i64), (i64, i64))| (a.0 - b.0).pow(2) + (a.1 - b.1).pow(2) < (radius * radius) as i64;
            let counted = tokens().flat_map(|a| tokens().map(move |b| (a, b))).filter(near).count();
            assert_eq!(near_pairs(edge, radius), counted as u64, "{edge} {radius}");
        }
    }

    /// Gflop of one attention layer of FLUX.1 dev at 1K, 2K, 4K and 8K, as the paper prints them; at 1K and radius 16
    /// one of its tables has 80.6.
    #[test]
    fn an_attention_layer_costs_what_the_paper_prints() {
        let layer = FlopCount { attends_all: 3072.0, ..FlopCount::default() };
        let printed = [
            (64, 260.9, [63.5, 86.6, 154.1]),
            (128, 3510.0, [250.0, 350.0, 720.0]),
            (256, 53_600.0, [980.0, 1430.0, 3140.0]),
            (512, 847_700.0, [3920.0, 5790.0, 13_090.0]),
        ];
        for (edge, full, clear) in printed {
            let image = EstimatedImage { tokens: (edge as f64).powi(2), text: 512, pixels: 0.0 };
            let close = |counted: f64, printed: f64| {
                assert!((counted * 1e3 / printed - 1.0).abs() < 0.02, "{edge}: {counted} Tflop, not {printed} Gflop");
            };
            close(image.teraflop(&layer, (edge as f64).powi(4)), full);
            for (radius, printed) in RADII.into_iter().zip(clear) {
                close(image.teraflop(&layer, near_pairs(edge, radius) as f64), printed);
            }
        }
    }
}
