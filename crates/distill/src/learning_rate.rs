//! The learning rate of each step: linear warmup, then constant or cosine decay; and when a training has learned enough.

use crate::{Decay, LearningRate, LossEntry};
use std::f64::consts::PI;

/// The steps of a training over which its rate decays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DecaySteps {
    /// Steps before the decay.
    pub from: usize,
    /// All steps.
    pub end: usize,
}

/// The share of its steps over which the rate of a training decays that ends when the held-out error is flat.
const FINAL_DECAY: f64 = 0.25;

/// The held-out error is flat if the last third of the steps so far lowered it by less than this share.
const FLAT: f64 = 0.08;

/// Before it was measured this often nothing is called flat.
const MEASUREMENTS: usize = 12;

impl DecaySteps {
    /// A decay over all of `steps`.
    pub(crate) fn whole(steps: usize) -> Self {
        Self { from: 0, end: steps }
    }

    /// A decay at the end of a training whose held-out error was flat after step `flat_at`, if it was, and that has at
    /// most `steps`.
    pub(crate) fn final_of(flat_at: Option<usize>, steps: usize) -> Self {
        let from = flat_at.unwrap_or(usize::MAX).min((steps as f64 * (1.0 - FINAL_DECAY)) as usize);
        Self { from, end: ((from as f64 / (1.0 - FINAL_DECAY)).ceil() as usize).clamp(1, steps) }
    }
}

/// Whether the held-out error of `entries` has stopped falling.
pub(crate) fn is_flat(entries: &[LossEntry]) -> bool {
    let measured: Vec<(usize, f64)> = entries.iter().filter_map(|entry| Some((entry.step, entry.held_out?))).collect();
    let Some(&(last, _)) = measured.last().filter(|_| measured.len() >= MEASUREMENTS) else { return false };
    // The error of single steps is noisy, so the best of the late ones is compared with the best of the early ones.
    let best = |is_late: bool| {
        let part = measured.iter().filter(|(step, _)| (3 * step > 2 * last) == is_late);
        part.fold(f64::INFINITY, |best, (_, error)| best.min(*error))
    };
    best(true) > (1.0 - FLAT) * best(false)
}

impl LearningRate {
    /// The rate at step `step`, counted from 0.
    pub(crate) fn at(&self, step: usize, decay: DecaySteps) -> f64 {
        let warmup = if step < self.warmup { (step + 1) as f64 / self.warmup as f64 } else { 1.0 };
        let decayed = match self.decay {
            Decay::Constant => 1.0,
            Decay::Cosine { floor } => {
                let (step, steps) = (step.saturating_sub(decay.from), decay.end - decay.from);
                let wave = 0.5 * (1.0 + (PI * step as f64 / steps.max(1) as f64).cos());
                floor + (1.0 - floor) * wave
            }
        };
        self.peak * warmup * decayed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Losses;

    #[test]
    fn rises_then_falls_to_the_floor() {
        let rate = LearningRate { peak: 2.0, warmup: 4, decay: Decay::Cosine { floor: 0.5 } };
        let whole = DecaySteps::whole(100);
        assert_eq!(rate.at(0, whole), 0.5);
        assert!((rate.at(50, whole) - 1.5).abs() < 1e-12);
        assert!((rate.at(100, whole) - 1.0).abs() < 1e-12);
        let late = DecaySteps { from: 60, end: 100 };
        assert_eq!(rate.at(60, late), 2.0);
        assert!((rate.at(80, late) - 1.5).abs() < 1e-12);
        let constant = LearningRate { decay: Decay::Constant, warmup: 0, ..rate };
        assert_eq!(constant.at(0, DecaySteps::whole(10)), 2.0);
        assert_eq!(constant.at(9, DecaySteps::whole(10)), 2.0);
    }

    #[test]
    fn the_last_quarter_decays() {
        assert_eq!(DecaySteps::final_of(None, 400), DecaySteps { from: 300, end: 400 });
        assert_eq!(DecaySteps::final_of(Some(90), 400), DecaySteps { from: 90, end: 120 });
        assert_eq!(DecaySteps::final_of(Some(399), 400), DecaySteps { from: 300, end: 400 });
        assert_eq!(DecaySteps::final_of(None, 1), DecaySteps { from: 0, end: 1 });
    }

    #[test]
    fn an_error_that_falls_is_not_flat() {
        let curve = |error: &dyn Fn(usize) -> f64, count: usize| -> Vec<LossEntry> {
            let entry = |step| LossEntry {
                step,
                losses: Losses::default(),
                norm: 1.0,
                rate: 1.0,
                seconds: 0.0,
                held_out: step.is_multiple_of(10).then(|| error(step)),
            };
            (1..=10 * count).map(entry).collect()
        };
        let falling = |step: usize| 1.0 / step as f64;
        let settling = |step: usize| 0.1 + 10.0 * falling(step) + if step.is_multiple_of(20) { 0.01 } else { 0.0 };
        assert!(!is_flat(&curve(&falling, 100)));
        assert!(!is_flat(&curve(&settling, 11)), "not measured often enough");
        assert!(!is_flat(&curve(&settling, 12)), "it still falls");
        assert!(is_flat(&curve(&settling, 60)));
    }
}
