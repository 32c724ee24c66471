//! [`TorchGenerator`]: the random numbers of `torch.Generator("cpu").manual_seed(seed)` in f32, so that a seed gives
//! the same image as in diffusers.

use crate::mersenne::Mersenne;
use candle_core::{Device, Result, Shape, Tensor};
use serde::{Deserialize, Serialize};

/// A CPU generator of torch. Successive calls continue one stream. Serialisation keeps the whole state, so a restored
/// generator continues bit for bit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "GeneratorState", into = "GeneratorState")]
pub struct TorchGenerator {
    bits: Mersenne,
    /// The second value of a pair of normals. torch also keeps it in the generator, across calls.
    spare: Option<f64>,
}

impl TorchGenerator {
    /// `torch.Generator("cpu").manual_seed(seed)`. Like torch, it uses the low 32 bits of the seed.
    pub fn new(seed: u64) -> Self {
        Self { bits: Mersenne::new(seed as u32), spare: None }
    }

    /// `torch.randn(shape, generator=self)`, f32 on the CPU. Equal to torch within 1e-6: torch's vectorised logarithm
    /// and sine round differently on different machines.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn randn(&mut self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        let values = self.normal(shape.elem_count());
        Tensor::from_vec(values, shape, &Device::Cpu)
    }

    /// `torch.rand(shape, generator=self)`, f32 in [0, 1) on the CPU. Bitwise equal to torch.
    ///
    /// # Errors
    /// A tensor operation failed.
    pub fn rand(&mut self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        let values = (0..shape.elem_count()).map(|_| self.uniform_f32()).collect::<Vec<_>>();
        Tensor::from_vec(values, shape, &Device::Cpu)
    }

    /// `torch.randint(0, bound, (1,), generator=self)`: an integer in 0..`bound`. A bound of 0 counts as 1.
    pub fn below(&mut self, bound: u32) -> u32 {
        self.bits.next() % bound.max(1)
    }

    /// `count` standard normal values: in blocks for 16 or more, one at a time otherwise, as in torch.
    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        if count < BLOCK { (0..count).map(|_| self.single() as f32).collect() } else { self.blocks(count) }
    }

    /// torch's `normal_fill`: fills everything with uniforms and converts blocks of 16 to normals in place. If the last
    /// block is incomplete, the last 16 values are generated anew.
    fn blocks(&mut self, count: usize) -> Vec<f32> {
        let mut values = (0..count).map(|_| self.uniform_f32()).collect::<Vec<_>>();
        values.chunks_exact_mut(BLOCK).for_each(box_muller);
        if !count.is_multiple_of(BLOCK) {
            let tail = &mut values[count - BLOCK..];
            tail.iter_mut().for_each(|value| *value = self.uniform_f32());
            box_muller(tail);
        }
        values
    }

    /// torch's `normal_distribution<double>`: generates two values and keeps the second for the next call.
    fn single(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let first = self.uniform_f64();
        let second = self.uniform_f64();
        let radius = (-2.0 * (-second).ln_1p()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * first).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }

    fn uniform_f32(&mut self) -> f32 {
        (self.bits.next() & 0x00ff_ffff) as f32 / (1 << 24) as f32
    }

    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.bits.next());
        let low = u64::from(self.bits.next());
        let bits = ((high << 32) | low) & ((1 << 53) - 1);
        bits as f64 / (1_u64 << 53) as f64
    }
}

/// torch vectorises over 16 values.
const BLOCK: usize = 16;

/// The transform of Box and Muller (1958) on 16 uniforms: the first half gives the radii, the second half the angles.
/// The angle is rounded to f32 as in torch, since that rounding alone can change a normal by more than 1e-6.
fn box_muller(block: &mut [f32]) {
    let (radii, angles) = block.split_at_mut(BLOCK / 2);
    for (first, second) in radii.iter_mut().zip(angles) {
        let radius = (-2.0 * (1.0 - *first).ln()).sqrt();
        let angle = std::f32::consts::TAU * *second;
        let (sin, cos) = f64::from(angle).sin_cos();
        *first = radius * cos as f32;
        *second = radius * sin as f32;
    }
}

/// The serialised state.
#[derive(Clone, Serialize, Deserialize)]
struct GeneratorState {
    words: Vec<u32>,
    used: usize,
    spare: Option<u64>,
}

impl From<TorchGenerator> for GeneratorState {
    fn from(generator: TorchGenerator) -> Self {
        let (words, used) = generator.bits.into_parts();
        Self { words, used, spare: generator.spare.map(f64::to_bits) }
    }
}

impl TryFrom<GeneratorState> for TorchGenerator {
    type Error = String;

    fn try_from(saved: GeneratorState) -> std::result::Result<Self, String> {
        let found = format!("{} words, {} used", saved.words.len(), saved.used);
        let bits = Mersenne::restore(saved.words, saved.used)
            .ok_or_else(|| format!("saved random state: expected 624 words and at most 624 used, found {found}"))?;
        Ok(Self { bits, spare: saved.spare.map(f64::from_bits) })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn fixture() -> Value {
        serde_json::from_str(include_str!("../fixtures/random.json")).unwrap()
    }

    fn floats(value: &Value) -> Vec<f64> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    }

    fn assert_near(got: impl IntoIterator<Item = f64>, want: &Value, what: &str) {
        let got = got.into_iter().collect::<Vec<_>>();
        let want = floats(want);
        assert_eq!(got.len(), want.len(), "{what}");
        for (index, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!((got - want).abs() <= 1e-6, "{what}, value {index}: {got} instead of {want}");
        }
    }

    fn check(got: &[f32], want: &Value, what: &str) {
        let got = got.iter().map(|&value| f64::from(value)).collect::<Vec<_>>();
        let Some(last) = want.get("last") else { return assert_near(got, &want["values"], what) };
        assert_near(got.iter().copied().step_by(41), &want["values"], what);
        assert_near(got[got.len() - 20..].iter().copied(), last, what);
        let weighted: f64 = got.iter().enumerate().map(|(index, value)| value * ((index % 7) + 1) as f64).sum();
        assert!((got.iter().sum::<f64>() - want["sum"].as_f64().unwrap()).abs() < 1e-4, "{what}: sum");
        assert!((weighted - want["weighted"].as_f64().unwrap()).abs() < 4e-4, "{what}: weighted sum");
    }

    #[test]
    fn randn_matches_torch() {
        for case in fixture()["fresh"].as_array().unwrap() {
            let seed = case["seed"].as_u64().unwrap();
            let size = case["size"].as_u64().unwrap() as usize;
            let got = TorchGenerator::new(seed).randn(size).unwrap().to_vec1::<f32>().unwrap();
            check(&got, case, &format!("seed {seed}, {size} values"));
        }
    }

    #[test]
    fn successive_calls_continue_the_stream() {
        let case = &fixture()["successive"];
        let mut generator = TorchGenerator::new(case["seed"].as_u64().unwrap());
        for call in case["calls"].as_array().unwrap() {
            let size = call["size"].as_u64().unwrap() as usize;
            check(&generator.normal(size), call, &format!("{size} values"));
        }
    }

    #[test]
    fn rand_and_below_match_torch() {
        let fixture = fixture();
        let got = TorchGenerator::new(5).rand(50).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(got, floats(&fixture["rand"]).into_iter().map(|value| value as f32).collect::<Vec<_>>());
        let mut generator = TorchGenerator::new(11);
        for case in fixture["below"].as_array().unwrap() {
            let bound = case[0].as_u64().unwrap();
            let want = case[1].as_u64().unwrap();
            assert_eq!(u64::from(generator.below(bound as u32)), want, "below {bound}");
        }
    }

    #[test]
    fn a_restored_state_continues_bit_for_bit() {
        let mut generator = TorchGenerator::new(9);
        generator.normal(1003);
        generator.normal(3);
        let saved = serde_json::to_string(&generator).unwrap();
        let mut restored: TorchGenerator = serde_json::from_str(&saved).unwrap();
        assert_eq!(restored, generator);
        let sizes = [1, 17, 5, 40];
        assert_eq!(sizes.map(|size| restored.normal(size)), sizes.map(|size| generator.normal(size)));
    }

    #[test]
    fn a_state_of_the_wrong_size_is_refused() {
        let failed = serde_json::from_str::<TorchGenerator>(r#"{"words": [1, 2], "used": 1, "spare": null}"#);
        assert!(failed.unwrap_err().to_string().contains("expected 624 words"));
    }
}
