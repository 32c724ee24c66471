//! The learning rate of each step: linear warmup, then constant or cosine decay.

use crate::{Decay, LearningRate};
use std::f64::consts::PI;

impl LearningRate {
    /// The rate at step `step` of `steps`, counted from 0.
    pub fn at(&self, step: usize, steps: usize) -> f64 {
        let warmup = if step < self.warmup { (step + 1) as f64 / self.warmup as f64 } else { 1.0 };
        let decay = match self.decay {
            Decay::Constant => 1.0,
            Decay::Cosine { floor } => {
                let wave = 0.5 * (1.0 + (PI * step as f64 / steps as f64).cos());
                floor + (1.0 - floor) * wave
            }
        };
        self.peak * warmup * decay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_then_falls_to_the_floor() {
        let rate = LearningRate { peak: 2.0, warmup: 4, decay: Decay::Cosine { floor: 0.5 } };
        assert_eq!(rate.at(0, 100), 0.5);
        assert!((rate.at(50, 100) - 1.5).abs() < 1e-12);
        assert!((rate.at(100, 100) - 1.0).abs() < 1e-12);
        let constant = LearningRate { decay: Decay::Constant, warmup: 0, ..rate };
        assert_eq!(constant.at(0, 10), 2.0);
        assert_eq!(constant.at(9, 10), 2.0);
    }
}
