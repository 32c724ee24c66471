//! [`SymmetricBlock`]: blocks in which a value is scale · code, with codes of either sign (Q3_K, Q6_K).

use super::lanes::{BlockValues, Lanes, inverse, largest, rounded, total, within};
use half::f16;

/// A block of 256 values in groups of 16, each with a scale that is a code too.
pub struct SymmetricBlock {
    /// What scale codes are multiplied by.
    pub scale: f16,
    /// Codes of the groups' scales.
    pub groups: [i8; 16],
    /// Codes of the values, from the least one on.
    pub codes: [[i8; 16]; 16],
}

/// By how much the number of steps to the largest value differs from the least code.
const STEPS: [f32; 13] = [-0.9, -0.75, -0.6, -0.45, -0.3, -0.15, 0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9];

impl SymmetricBlock {
    /// `values` with codes from -`steps` to `steps` - 1, and codes of scales from -`steps_of_groups` on.
    #[inline(always)]
    pub fn fit(values: &BlockValues, steps: u8, steps_of_groups: u8) -> Self {
        let (steps, steps_of_groups) = (f32::from(steps), f32::from(steps_of_groups));
        let mut scales = [0.0f32; 16];
        (0..16).for_each(|group| scales[group] = fit_group(&values[group], steps));
        let scale = f16::from_f32(-largest(&scales, of_larger_magnitude) / steps_of_groups);
        let by = inverse(scale.to_f32());
        let groups = scales.map(|scale| within(rounded(scale * by), -steps_of_groups, steps_of_groups - 1.0));
        let first = Self::with(values, steps, scale, &groups);
        let second = Self::with(values, steps, first.refined(values), &groups);
        if second.error(values) < first.error(values) { second } else { first }
    }

    /// The block with these scales, and the nearest codes.
    #[inline(always)]
    fn with(values: &BlockValues, steps: f32, scale: f16, groups: &[f32; 16]) -> Self {
        let mut codes = [[0; 16]; 16];
        for (group, values) in values.iter().enumerate() {
            let by = inverse(scale.to_f32() * groups[group]);
            for lane in 0..16 {
                codes[group][lane] = within(rounded(values[lane] * by), -steps, steps - 1.0) as i8;
            }
        }
        Self { scale, groups: groups.map(|code| code as i8), codes }
    }

    /// The scale of the block that is best for its codes, by least squares.
    #[inline(always)]
    fn refined(&self, values: &BlockValues) -> f16 {
        let (mut squares, mut products) = ([0.0f32; 16], [0.0f32; 16]);
        for (group, values) in values.iter().enumerate() {
            for lane in 0..16 {
                let code = f32::from(self.groups[group]) * f32::from(self.codes[group][lane]);
                squares[lane] += code * code;
                products[lane] += code * values[lane];
            }
        }
        f16::from_f32(total(&products) * inverse(total(&squares)))
    }

    /// The sum of the squared errors.
    #[inline(always)]
    fn error(&self, values: &BlockValues) -> f32 {
        let mut sum = [0.0f32; 16];
        for (group, values) in values.iter().enumerate() {
            let scale = self.scale.to_f32() * f32::from(self.groups[group]);
            for lane in 0..16 {
                let error = scale * f32::from(self.codes[group][lane]) - values[lane];
                sum[lane] += error * error;
            }
        }
        total(&sum)
    }
}

/// The scale with the smallest squared error, of those that follow from some numbers of steps by least squares: with it
/// Σ (scale · code - value)² = Σ value² - (Σ code · value)² / Σ code².
#[inline(always)]
fn fit_group(values: &Lanes, steps: f32) -> f32 {
    let extreme = largest(values, of_larger_magnitude);
    if extreme == 0.0 {
        return 0.0;
    }
    let (mut best, mut gain) = (-extreme / steps, 0.0);
    for step in STEPS {
        let by = -(steps + step) / extreme;
        let (mut squares, mut products) = ([0.0f32; 16], [0.0f32; 16]);
        for lane in 0..16 {
            let code = within(rounded(values[lane] * by), -steps, steps - 1.0);
            squares[lane] = code * code;
            products[lane] = code * values[lane];
        }
        let (squares, products) = (total(&squares), total(&products));
        if products * products > gain * squares {
            gain = products * products / squares;
            best = products / squares;
        }
    }
    best
}

#[inline(always)]
fn of_larger_magnitude(a: f32, b: f32) -> f32 {
    if a.abs() < b.abs() { b } else { a }
}
