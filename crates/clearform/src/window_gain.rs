//! [`WindowGain`]: what the windows of a plan gain on a model, and whether they reach far enough.

use crate::Result;
use crate::observer::Observer;
use clearform_attention::{AttentionPlan, Geometry, Policy, TokenGrid};
use clearform_layout::{Identified, PipelineScale, evaluation_teraflop};
use std::fmt;

/// The share of an image from which on a window saves next to nothing.
const NEARLY_ALL: f64 = 0.95;

/// What attending to windows gains at one size.
#[derive(Debug, Clone)]
pub struct WindowGain {
    grid: TokenGrid,
    plan: String,
    /// The share of the image that a token sees on average.
    seen: f64,
    /// What is said if the windows of all blocks together do not reach across the image.
    short_reach: Option<String>,
    /// Operations of one evaluation with full attention, divided by those with the plan.
    fewer_operations: Option<f64>,
}

impl WindowGain {
    /// The gain of `plan` for images of `grid` tokens and `pixels` pixels, and for prompts of `text` tokens.
    pub fn new(identified: &Identified, plan: &AttentionPlan, grid: TokenGrid, pixels: usize, text: usize) -> Self {
        let all = pairs(grid);
        let layers = layers(plan, identified);
        let count: usize = layers.iter().map(|(_, count)| count).sum();
        let mean = |pairs: &dyn Fn(&Policy) -> u64| {
            layers.iter().map(|(policy, count)| pairs(policy) as f64 * *count as f64).sum::<f64>() / count.max(1) as f64
        };
        let seen = mean(&|policy| in_windows(policy, grid));
        let attended = mean(&|policy| in_windows(policy, grid) + in_pooled_context(policy, grid));
        let teraflop = |pairs| evaluation_teraflop(identified, grid.tokens(), pixels, text, pairs);
        Self {
            grid,
            plan: plan.to_string(),
            seen: seen / all as f64,
            short_reach: short_reach(plan, &layers, grid, text),
            fewer_operations: teraflop(all).zip(teraflop(attended as u64)).map(|(full, clear)| full / clear),
        }
    }

    /// The gain at the size that the model was trained on, whose pipeline is of `scale`.
    ///
    /// # Errors
    /// The size is too large for a token grid.
    pub fn at_native_size(identified: &Identified, scale: PipelineScale, plan: &AttentionPlan) -> Result<Self> {
        let side = scale.side(identified);
        let tokens = side.div_ceil(scale.pixels_per_token.max(1));
        let grid = TokenGrid::new(tokens, tokens)?;
        Ok(Self::new(identified, plan, grid, side * side, scale.text_tokens))
    }

    /// Tells the observer the gain, and what speaks against the plan.
    pub fn announce(&self, observer: &mut dyn Observer) {
        observer.note(&self.to_string());
        self.warnings().iter().for_each(|warning| observer.note(warning));
    }

    /// Whether each token sees the whole image.
    pub fn covers_all(&self) -> bool {
        self.seen > 0.999
    }

    /// What speaks against the plan.
    pub fn warnings(&self) -> Vec<String> {
        let Self { grid, plan, seen, short_reach, .. } = self;
        let mut warnings: Vec<String> = short_reach.iter().cloned().collect();
        if *seen > NEARLY_ALL && plan != "full" {
            warnings.push(format!(
                "warning: {plan} covers {} of {} x {} tokens, so nothing would be gained; choose a smaller radius",
                if self.covers_all() { "all" } else { "nearly all" },
                grid.height,
                grid.width
            ));
        }
        warnings
    }
}

/// The policies of a plan, each with the number of layers that have it.
fn layers(plan: &AttentionPlan, identified: &Identified) -> Vec<(Policy, usize)> {
    let blocks: usize = identified.depths().values().sum();
    let own = plan.exceptions().values().map(|policy| (*policy, 1));
    let others = blocks.saturating_sub(plan.exceptions().len());
    own.chain([(plan.default_policy(), others)]).filter(|(_, count)| *count > 0).collect()
}

/// Pairs of image tokens that attend to each other.
fn in_windows(policy: &Policy, grid: TokenGrid) -> u64 {
    match policy {
        Policy::Full => pairs(grid),
        Policy::Clear { radius, .. } => Geometry::new(vec![grid]).efficiency(*radius).inside,
    }
}

/// Pairs of an image token and a cell of the pooled context.
fn in_pooled_context(policy: &Policy, grid: TokenGrid) -> u64 {
    match policy {
        Policy::Clear { pool: Some(edge), .. } => {
            (grid.tokens() * grid.height.div_ceil(*edge) * grid.width.div_ceil(*edge)) as u64
        }
        _ => 0,
    }
}

/// Pairs of image tokens.
pub fn pairs(grid: TokenGrid) -> u64 {
    (grid.tokens() * grid.tokens()) as u64
}

impl fmt::Display for WindowGain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { grid, plan, seen, fewer_operations, .. } = self;
        write!(f, "{} x {} tokens: with {plan} a token sees {:.0}% of them", grid.height, grid.width, 100.0 * seen)?;
        match fewer_operations {
            Some(times) => write!(f, ", and an evaluation takes {times:.2} times fewer operations"),
            None => Ok(()),
        }
    }
}

/// Without text and pooled context, what one side of an image has to do with the other passes through the windows of one
/// block after another, each of which carries it by less than the radius.
fn short_reach(plan: &AttentionPlan, layers: &[(Policy, usize)], grid: TokenGrid, text: usize) -> Option<String> {
    let reach_of = |(policy, count): &(Policy, usize)| match policy {
        Policy::Clear { radius, pool: None } => Some(radius.tokens() * *count as f64),
        _ => None,
    };
    let reach: f64 = layers.iter().map(reach_of).sum::<Option<f64>>()?;
    let blocks: usize = layers.iter().map(|(_, count)| count).sum();
    let diagonal = ((grid.height * grid.height + grid.width * grid.width) as f64).sqrt();
    let needed = (diagonal / blocks as f64).ceil();
    (text == 0 && reach < diagonal).then(|| {
        format!(
            "warning: {blocks} blocks of {plan} carry information over {reach:.0} tokens, less than the diagonal of the \
             image ({diagonal:.0}), and no text carries it further; choose --radius {needed:.0} or more, or add pooled \
             context (--pool 4)"
        )
    })
}
