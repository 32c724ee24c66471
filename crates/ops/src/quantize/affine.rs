//! [`AffineBlock`]: blocks in which a value is scale · code - offset (Q2_K, Q4_K, Q5_K).

use super::lanes::{BlockValues, Codes, Lanes, inverse, largest, rounded, total, within};
use half::f16;

/// A block of 256 values in groups of 16 or 32, each with a scale and an offset that are codes too.
pub struct AffineBlock {
    /// What scale codes are multiplied by.
    pub scale: f16,
    /// What offset codes are multiplied by.
    pub offset: f16,
    /// Codes of the groups' scales and offsets.
    pub groups: [[u8; 2]; 16],
    /// Codes of the values.
    pub codes: Codes,
}

/// A group as scale · code - offset, with an offset of 0 or more.
#[derive(Clone, Copy, Default)]
struct Group {
    scale: f32,
    offset: f32,
}

/// By how much the number of steps between the smallest and the largest value differs from the largest code.
const STEPS: [f32; 15] = [-0.95, -0.8, -0.65, -0.5, -0.35, -0.2, -0.05, 0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0];

impl AffineBlock {
    /// `values` in groups of `V` vectors, with codes up to `most` and codes of scales and offsets up to `most_of_groups`.
    #[inline(always)]
    pub fn fit<const V: usize>(values: &BlockValues, most: u8, most_of_groups: u8) -> Self {
        let mut groups = [Group::default(); 16];
        let (mut scale, mut offset) = (0.0f32, 0.0f32);
        for group in 0..16 / V {
            let fitted = fit_group::<V>(&std::array::from_fn(|vector| values[group * V + vector]), f32::from(most));
            scale = scale.max(fitted.scale);
            offset = offset.max(fitted.offset);
            groups[group] = fitted;
        }
        let most_of_groups = f32::from(most_of_groups);
        let [scale, offset] = [scale, offset].map(|largest| f16::from_f32(largest / most_of_groups));
        let [by_scale, by_offset] = [scale, offset].map(|unit| inverse(unit.to_f32()));
        let codes = groups.map(|Group { scale, offset }| {
            [scale * by_scale, offset * by_offset].map(|code| within(rounded(code), 0.0, most_of_groups))
        });
        let first = Self::with::<V>(values, most, [scale, offset], &codes);
        let [scale, offset] = first.refined::<V>(values);
        let second = Self::with::<V>(values, most, [scale, offset], &codes);
        if second.error::<V>(values) < first.error::<V>(values) { second } else { first }
    }

    /// The block with these scales and offsets, and the nearest codes.
    #[inline(always)]
    fn with<const V: usize>(
        values: &BlockValues,
        most: u8,
        [scale, offset]: [f16; 2],
        groups: &[[f32; 2]; 16],
    ) -> Self {
        let mut codes = [[0; 16]; 16];
        for (vector, values) in values.iter().enumerate() {
            let [of_scale, of_offset] = groups[vector / V];
            let by = inverse(scale.to_f32() * of_scale);
            let added = offset.to_f32() * of_offset;
            for lane in 0..16 {
                codes[vector][lane] = within(rounded((values[lane] + added) * by), 0.0, f32::from(most)) as u8;
            }
        }
        Self { scale, offset, groups: groups.map(|group| group.map(|code| code as u8)), codes }
    }

    /// The scale and offset of the block that are best for its codes: the solution of the normal equations of
    /// x ≈ scale · (group's scale · code) - offset · (group's offset).
    #[inline(always)]
    fn refined<const V: usize>(&self, values: &BlockValues) -> [f16; 2] {
        let mut sums = [[0.0f32; 16]; 5];
        for (vector, values) in values.iter().enumerate() {
            let [of_scale, of_offset] = self.groups[vector / V].map(f32::from);
            for lane in 0..16 {
                let (x, a) = (values[lane], of_scale * f32::from(self.codes[vector][lane]));
                let terms = [a * a, a * of_offset, of_offset * of_offset, a * x, of_offset * x];
                sums.iter_mut().zip(terms).for_each(|(sum, term)| sum[lane] += term);
            }
        }
        let [aa, ab, bb, ax, bx] = sums.map(|lanes| total(&lanes));
        let determinant = aa * bb - ab * ab;
        let found = match determinant > 0.0 {
            true => [(ax * bb - ab * bx) / determinant, (ab * ax - aa * bx) / determinant],
            false => [ax * inverse(aa), 0.0],
        };
        if found.iter().all(|unit| *unit >= 0.0) { found.map(f16::from_f32) } else { [self.scale, self.offset] }
    }

    /// The sum of the squared errors.
    #[inline(always)]
    fn error<const V: usize>(&self, values: &BlockValues) -> f32 {
        let mut sum = [0.0f32; 16];
        for (vector, values) in values.iter().enumerate() {
            let [of_scale, of_offset] = self.groups[vector / V].map(f32::from);
            let (scale, offset) = (self.scale.to_f32() * of_scale, self.offset.to_f32() * of_offset);
            for lane in 0..16 {
                let error = scale * f32::from(self.codes[vector][lane]) - offset - values[lane];
                sum[lane] += error * error;
            }
        }
        total(&sum)
    }
}

/// The scale and offset with the smallest squared error that codes up to `most` give, of those that follow from some
/// numbers of steps by least squares.
#[inline(always)]
fn fit_group<const V: usize>(values: &[Lanes; V], most: f32) -> Group {
    let mut low = [0.0f32; 16];
    let mut high = [f32::MIN; 16];
    for vector in values {
        for lane in 0..16 {
            low[lane] = if vector[lane] < low[lane] { vector[lane] } else { low[lane] };
            high[lane] = if vector[lane] > high[lane] { vector[lane] } else { high[lane] };
        }
    }
    let lowest = largest(&low, |a, b| if a < b { a } else { b });
    let range = largest(&high, |a, b| if a > b { a } else { b }) - lowest;
    if range <= 0.0 {
        return Group { scale: 0.0, offset: -lowest };
    }
    // Above the lowest value, where sums lose less.
    let above: [Lanes; V] = std::array::from_fn(|vector| values[vector].map(|value| value - lowest));
    let mut sum = [0.0f32; 16];
    above.iter().for_each(|vector| (0..16).for_each(|lane| sum[lane] += vector[lane]));
    let (count, sum) = ((16 * V) as f32, total(&sum));
    let mut best = Group { scale: range / most, offset: -lowest };
    let mut least = f32::INFINITY;
    for step in STEPS {
        let [q, qq, qx] = code_sums(&above, (most + step) / range, most);
        let determinant = count * qq - q * q;
        if determinant <= 0.0 {
            continue;
        }
        let mut scale = (count * qx - sum * q) / determinant;
        let mut shift = (qq * sum - q * qx) / determinant;
        if lowest + shift > 0.0 {
            // Offsets are not negative: the line goes through 0.
            shift = -lowest;
            scale = (qx + lowest * q) / qq;
        }
        let error = scale * (scale * qq + 2.0 * (shift * q - qx)) + shift * (count * shift - 2.0 * sum);
        if scale > 0.0 && error < least {
            least = error;
            best = Group { scale, offset: -(lowest + shift) };
        }
    }
    best
}

/// The sums of the codes q of `values`, of their squares, and of q · value, with `by` codes for a value of 1.
#[inline(always)]
fn code_sums<const V: usize>(values: &[Lanes; V], by: f32, most: f32) -> [f32; 3] {
    let mut sums = [[0.0f32; 16]; 3];
    for vector in values {
        for lane in 0..16 {
            let code = rounded(vector[lane] * by);
            let code = if code < most { code } else { most };
            sums[0][lane] += code;
            sums[1][lane] += code * code;
            sums[2][lane] += code * vector[lane];
        }
    }
    sums.map(|lanes| total(&lanes))
}
