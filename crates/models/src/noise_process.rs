//! [`NoiseProcess`]: how training adds noise to latents, the timestep the model takes and the target it predicts.

use crate::{ModelError, Result};
use candle_core::{DType, Tensor};

// DDPM's linear schedule, with which DiT and PixArt were trained (section 4 of the paper).
const FIRST_BETA: f64 = 1e-4;
const LAST_BETA: f64 = 0.02;
const DIFFUSION_STEPS: usize = 1000;

/// How latents x0 are mixed with noise, which timestep the model takes and what it predicts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NoiseProcess {
    /// Rectified flow (Liu et al., arXiv 2209.03003): x_t = (1 - t) x0 + t noise. The model predicts noise - x0.
    FlowMatching {
        /// The model's timestep is t times this: 1 for FLUX and minRF, 1000 for SD3.
        time_scale: f64,
    },
    /// The same path in the direction of SiT's linear interpolant (Ma et al., arXiv 2401.08740): the model takes 1 - t
    /// and predicts x0 - noise.
    ReversedFlow,
    /// DDPM (Ho et al., arXiv 2006.11239, equation 4) with betas linear from 1e-4 to 0.02 over 1000 steps. DiT and
    /// PixArt use it: x_t = sqrt(abar) x0 + sqrt(1 - abar) noise. The model takes the integer step and predicts the
    /// noise.
    Ddpm,
}

/// Noisy latents with the timestep and target of the training loss. All in f32.
#[derive(Debug, Clone)]
pub struct Noised {
    /// x_t, shaped like x0.
    pub latents: Tensor,
    /// Timestep in the model's range, (batch).
    pub timestep: Tensor,
    /// What the model should predict, shaped like x0.
    pub target: Tensor,
}

impl NoiseProcess {
    /// Adds `noise` to `x0` (`scheduler.add_noise`), with one `level` per sample from 0 (data) to 1 (noise). The step
    /// of [`Self::Ddpm`] is floor(1000 level), at most 999.
    ///
    /// # Shapes
    /// x0 and noise (batch, ...), level (batch).
    ///
    /// # Errors
    /// Shapes that do not match.
    pub fn add_noise(&self, x0: &Tensor, noise: &Tensor, level: &Tensor) -> Result<Noised> {
        check_shapes(x0, noise, level)?;
        let x0 = as_f32(x0)?;
        let noise = as_f32(noise)?;
        let level = as_f32(level)?;
        match self {
            Self::FlowMatching { time_scale } => {
                let timestep = level.affine(*time_scale, 0.0)?;
                Ok(Noised { latents: interpolate(&x0, &noise, &level)?, timestep, target: (noise - x0)? })
            }
            Self::ReversedFlow => {
                let timestep = level.affine(-1.0, 1.0)?;
                Ok(Noised { latents: interpolate(&x0, &noise, &level)?, timestep, target: (x0 - noise)? })
            }
            Self::Ddpm => add_ddpm_noise(&x0, noise, &level),
        }
    }

    /// Whether this is a rectified flow: latents and noise are interpolated linearly.
    pub fn is_flow(&self) -> bool {
        !matches!(self, Self::Ddpm)
    }
}

/// Drops the variance that DiT and PixArt predict in additional channels (`learned_sigma`): keeps as many channels as
/// `latents` have. Packed predictions, and predictions without a variance, are unchanged.
///
/// # Shapes
/// prediction (batch, predicted channels, height, width), latents (batch, channels, height, width) -> as latents.
///
/// # Errors
/// A tensor operation failed.
pub fn without_variance(prediction: &Tensor, latents: &Tensor) -> Result<Tensor> {
    match (prediction.dims(), latents.dims()) {
        (&[_, predicted, _, _], &[_, channels, _, _]) if predicted > channels => {
            Ok(prediction.narrow(1, 0, channels)?.contiguous()?)
        }
        _ => Ok(prediction.clone()),
    }
}

/// `torch.linspace(first, last, count)` in f32, bit for bit. As there, the step is rounded to f32, and each value is
/// computed from the nearer end and rounded once.
pub fn linear_betas(first: f64, last: f64, count: usize) -> Vec<f32> {
    let first = first as f32;
    let last = last as f32;
    let step = f64::from((last - first) / (count.max(2) - 1) as f32);
    let value = |index: usize| {
        let from_end = (count - index - 1) as f64;
        let value =
            if index < count / 2 { f64::from(first) + step * index as f64 } else { f64::from(last) - step * from_end };
        value as f32
    };
    (0..count).map(value).collect()
}

/// abar, the cumulative product of 1 - beta: `torch.cumprod` in f32, which multiplies in f64 and rounds each result.
pub fn alphas_cumprod(betas: &[f32]) -> Vec<f32> {
    let product = |state: &mut f64, beta: &f32| {
        *state *= f64::from(1.0 - beta);
        Some(*state as f32)
    };
    betas.iter().scan(1.0, product).collect()
}

fn check_shapes(x0: &Tensor, noise: &Tensor, level: &Tensor) -> Result<()> {
    if x0.dims() != noise.dims() {
        let reason = format!("expected shape {:?}, the latents', found {:?}", x0.dims(), noise.dims());
        return Err(ModelError::bad_input("noise", reason));
    }
    match (x0.dims(), level.dims()) {
        ([batch, ..], [levels]) if batch == levels => Ok(()),
        (latents, found) => {
            let reason = format!("expected one level per sample of latents {latents:?}, found shape {found:?}");
            Err(ModelError::bad_input("level", reason))
        }
    }
}

/// DDPM, equation 4.
fn add_ddpm_noise(x0: &Tensor, noise: Tensor, level: &Tensor) -> Result<Noised> {
    let last = (DIFFUSION_STEPS - 1) as f64;
    let timestep = level.affine(DIFFUSION_STEPS as f64, 0.0)?.floor()?.clamp(0.0, last)?;
    let abar = alphas_cumprod(&linear_betas(FIRST_BETA, LAST_BETA, DIFFUSION_STEPS));
    let abar = Tensor::new(abar, level.device())?.index_select(&timestep.to_dtype(DType::U32)?, 0)?;
    let signal = x0.broadcast_mul(&broadcastable(&abar.sqrt()?, x0)?)?;
    let latents = (signal + noise.broadcast_mul(&broadcastable(&abar.affine(-1.0, 1.0)?.sqrt()?, x0)?)?)?;
    Ok(Noised { latents, timestep, target: noise })
}

/// (1 - level) x0 + level noise.
fn interpolate(x0: &Tensor, noise: &Tensor, level: &Tensor) -> Result<Tensor> {
    let level = broadcastable(level, x0)?;
    Ok((x0.broadcast_mul(&level.affine(-1.0, 1.0)?)? + noise.broadcast_mul(&level)?)?)
}

/// Reshapes (batch) to (batch, 1, ...) with the rank of `latents`, for broadcasting.
fn broadcastable(level: &Tensor, latents: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; latents.rank()];
    shape[0] = level.dim(0)?;
    Ok(level.reshape(shape)?)
}

fn as_f32(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_dtype(DType::F32)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn pairs(values: [[f32; 2]; 2]) -> Tensor {
        Tensor::new(&values, &Device::Cpu).unwrap()
    }

    fn noised(process: NoiseProcess, levels: [f32; 2]) -> Noised {
        process
            .add_noise(&pairs([[1.0, -2.0], [4.0, 0.0]]), &pairs([[3.0, 2.0], [0.0, 8.0]]), &tensor(&levels))
            .unwrap()
    }

    fn check(process: NoiseProcess, latents: [[f32; 2]; 2], timestep: [f32; 2], target: [[f32; 2]; 2]) {
        let noised = noised(process, [0.25, 0.5]);
        assert_eq!(noised.latents.to_vec2::<f32>().unwrap(), latents, "{process:?}");
        assert_eq!(noised.timestep.to_vec1::<f32>().unwrap(), timestep, "{process:?}");
        assert_eq!(noised.target.to_vec2::<f32>().unwrap(), target, "{process:?}");
    }

    #[test]
    fn flows_match_hand_computed_values() {
        let latents = [[1.5, -1.0], [2.0, 4.0]];
        let target = [[2.0, 4.0], [-4.0, 8.0]];
        check(NoiseProcess::FlowMatching { time_scale: 1.0 }, latents, [0.25, 0.5], target);
        check(NoiseProcess::FlowMatching { time_scale: 1000.0 }, latents, [250.0, 500.0], target);
        check(NoiseProcess::ReversedFlow, latents, [0.75, 0.5], target.map(|row| row.map(|value| -value)));
    }

    /// Values of `DDPMScheduler().add_noise` in diffusers 0.42.1 for x0 = (1, -2), (4, 0) and noise = (3, 2), (0, 8).
    #[test]
    fn ddpm_noise_matches_diffusers() {
        let cases = [
            ([0.0, 0.9999], [0.0, 999.0], ADDED_AT_THE_ENDS),
            ([0.25, 1.0], [250.0, 999.0], ADDED_AT_A_QUARTER),
            ([0.0019, 0.5], [1.0, 500.0], ADDED_HALFWAY),
        ];
        for (levels, steps, want) in cases {
            let noised = noised(NoiseProcess::Ddpm, levels);
            assert_eq!(noised.timestep.to_vec1::<f32>().unwrap(), steps);
            assert_eq!(noised.target.to_vec2::<f32>().unwrap(), [[3.0, 2.0], [0.0, 8.0]]);
            let got = noised.latents.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let close = got.iter().zip(want).all(|(got, want)| (got - want).abs() <= 1e-6 * want.abs().max(1.0));
            assert!(close, "{levels:?}: {got:?} instead of {want:?}");
        }
    }

    #[test]
    fn betas_and_abar_match_torch() {
        let betas = linear_betas(1e-4, 0.02, 1000);
        let abar = alphas_cumprod(&betas);
        for (step, beta, want) in TORCH {
            assert_eq!((betas[step], abar[step]), (beta, want), "step {step}");
        }
    }

    #[test]
    fn bf16_latents_are_mixed_in_f32() {
        let half = |tensor: Tensor| tensor.to_dtype(DType::BF16).unwrap();
        let x0 = half(pairs([[1.0, 0.0], [0.0, 0.0]]));
        let noise = half(pairs([[0.0, 1.0], [0.0, 0.0]]));
        let noised = NoiseProcess::ReversedFlow.add_noise(&x0, &noise, &tensor(&[0.3, 0.0])).unwrap();
        assert_eq!(noised.latents.to_vec2::<f32>().unwrap(), [[0.7, 0.3], [0.0, 0.0]]);
    }

    #[test]
    fn shapes_that_do_not_match_are_refused() {
        let flow = NoiseProcess::FlowMatching { time_scale: 1.0 };
        let two = tensor(&[0.0, 1.0]);
        let three = tensor(&[0.0, 0.5, 1.0]);
        let latents = pairs([[0.0; 2]; 2]);
        for (noise, level, name) in [(&two, &two, "noise"), (&latents, &three, "level"), (&latents, &latents, "level")]
        {
            let error = flow.add_noise(&latents, noise, level).unwrap_err().to_string();
            assert!(error.contains(&format!("input {name:?}: expected")), "{error}");
        }
    }

    const ADDED_AT_THE_ENDS: [f32; 4] = [1.029_952_5, -1.979_898_3, 0.025_411_274, 7.999_839];
    const ADDED_AT_A_QUARTER: [f32; 4] = [2.797_474_1, -0.060_607_314, 0.025_411_274, 7.999_839];
    const ADDED_HALFWAY: [f32; 4] = [1.044_381_3, -1.970_119_2, 1.115_682, 7.682_513_7];
    /// Step, beta, abar.
    const TORCH: [(usize, f32, f32); 8] = [
        (0, 0.0001, 0.9999),
        (1, 0.000_119_919_92, 0.999_780_06),
        (7, 0.000_239_439_44, 0.998_643),
        (14, 0.000_378_878_87, 0.996_414_3),
        (499, 0.010_040_04, 0.078_587_234),
        (500, 0.010_059_959, 0.077_796_65),
        (957, 0.019_163_363, 0.000_092_648_675),
        (999, 0.02, 0.000_040_358_304),
    ];
}
