//! [`NoiseProcess`]: what lies between a picture and noise, and what a family's model takes and predicts there. It knows
//! no model and no schedule.

use crate::{ModelError, Result};
use candle_core::{DType, Tensor};

const FIRST_BETA: f64 = 1e-4;
const LAST_BETA: f64 = 0.02;
const DIFFUSION_STEPS: usize = 1000;

/// How a family mixes latents x0 with noise, in which unit its model takes the time, and what it predicts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NoiseProcess {
    /// Rectified flow (Liu et al., arXiv 2209.03003): x_t = (1 - t) x0 + t noise. The model predicts noise - x0.
    FlowMatching {
        /// The model takes t times this: 1 for FLUX and minRF, 1000 for SD3.
        time_scale: f64,
    },
    /// The same path told backwards, as the linear path of SiT (Ma et al., arXiv 2401.08740): the model takes 1 - t
    /// and predicts x0 - noise.
    ReversedFlow,
    /// DDPM (Ho et al., arXiv 2006.11239, equation 4) with betas linear from 1e-4 to 0.02 over 1000 steps, as DiT and
    /// PixArt: x_t = sqrt(abar) x0 + sqrt(1 - abar) noise. The model takes the whole number of the step and predicts
    /// the noise.
    Ddpm,
}

/// Latents with noise in them, and what a perfect model makes of them. All in f32.
#[derive(Debug, Clone)]
pub struct Noised {
    /// The mixture, shaped as the latents.
    pub latents: Tensor,
    /// The time in the model's unit, (batch).
    pub timestep: Tensor,
    /// The model's perfect prediction, shaped as the latents.
    pub target: Tensor,
}

impl NoiseProcess {
    /// Mixes `noise` into `x0`, each sample at its own `level` from 0, the picture, to 1. A diffusion's step is
    /// floor(1000 level), at most 999.
    ///
    /// # Shapes
    /// x0 and noise alike, (batch, ...); level (batch).
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn noised(&self, x0: &Tensor, noise: &Tensor, level: &Tensor) -> Result<Noised> {
        check_shapes(x0, noise, level)?;
        let (x0, noise, level) = (as_f32(x0)?, as_f32(noise)?, as_f32(level)?);
        match self {
            Self::FlowMatching { time_scale } => {
                let timestep = level.affine(*time_scale, 0.0)?;
                Ok(Noised { latents: between(&x0, &noise, &level)?, timestep, target: (noise - x0)? })
            }
            Self::ReversedFlow => {
                let timestep = level.affine(-1.0, 1.0)?;
                Ok(Noised { latents: between(&x0, &noise, &level)?, timestep, target: (x0 - noise)? })
            }
            Self::Ddpm => diffused(&x0, noise, &level),
        }
    }

    /// Whether latents and noise are mixed along a straight line.
    pub fn is_flow(&self) -> bool {
        !matches!(self, Self::Ddpm)
    }
}

/// A prediction without the variance that some diffusions predict beside it: the first channels, as many as `latents`
/// have. Packed latents and predictions without a variance are as they are.
///
/// # Shapes
/// (batch, as many channels or more, height, width), latents (batch, channels, height, width) -> as latents.
///
/// # Errors
/// The tensor library refused.
pub fn without_variance(prediction: &Tensor, latents: &Tensor) -> Result<Tensor> {
    match (prediction.dims(), latents.dims()) {
        (&[_, predicted, _, _], &[_, channels, _, _]) if predicted > channels => {
            Ok(prediction.narrow(1, 0, channels)?.contiguous()?)
        }
        _ => Ok(prediction.clone()),
    }
}

/// `count` betas from `first` to `last`, bit for bit those of torch.linspace in f32: the gap is f32, and what is
/// counted from the nearer end by it is rounded once.
pub fn linear_betas(first: f64, last: f64, count: usize) -> Vec<f32> {
    let (first, last) = (first as f32, last as f32);
    let gap = f64::from((last - first) / (count.max(2) - 1) as f32);
    let value = |index: usize| {
        let from_end = (count - index - 1) as f64;
        let from_nearer =
            if index < count / 2 { f64::from(first) + gap * index as f64 } else { f64::from(last) - gap * from_end };
        from_nearer as f32
    };
    (0..count).map(value).collect()
}

/// abar, the product of 1 - beta up to each step, as torch.cumprod in f32: multiplied in f64, each rounded.
pub fn alphas_cumprod(betas: &[f32]) -> Vec<f32> {
    let product = |state: &mut f64, beta: &f32| {
        *state *= f64::from(1.0 - beta);
        Some(*state as f32)
    };
    betas.iter().scan(1.0, product).collect()
}

fn check_shapes(x0: &Tensor, noise: &Tensor, level: &Tensor) -> Result<()> {
    if x0.dims() != noise.dims() {
        let reason = format!("expected the latents' shape {:?}, found {:?}", x0.dims(), noise.dims());
        return Err(ModelError::bad_input("noise", reason));
    }
    match (x0.dims(), level.dims()) {
        ([batch, ..], [levels]) if batch == levels => Ok(()),
        (latents, found) => {
            let reason = format!("expected one for each sample of latents {latents:?}, found {found:?}");
            Err(ModelError::bad_input("level", reason))
        }
    }
}

fn diffused(x0: &Tensor, noise: Tensor, level: &Tensor) -> Result<Noised> {
    let last = (DIFFUSION_STEPS - 1) as f64;
    let timestep = level.affine(DIFFUSION_STEPS as f64, 0.0)?.floor()?.clamp(0.0, last)?;
    let abar = alphas_cumprod(&linear_betas(FIRST_BETA, LAST_BETA, DIFFUSION_STEPS));
    let abar = Tensor::new(abar, level.device())?.index_select(&timestep.to_dtype(DType::U32)?, 0)?;
    let signal = x0.broadcast_mul(&along(&abar.sqrt()?, x0)?)?;
    let latents = (signal + noise.broadcast_mul(&along(&abar.affine(-1.0, 1.0)?.sqrt()?, x0)?)?)?;
    Ok(Noised { latents, timestep, target: noise })
}

/// (1 - level) x0 + level noise.
fn between(x0: &Tensor, noise: &Tensor, level: &Tensor) -> Result<Tensor> {
    let level = along(level, x0)?;
    Ok((x0.broadcast_mul(&level.affine(-1.0, 1.0)?)? + noise.broadcast_mul(&level)?)?)
}

/// (batch) to (batch, 1, ...), as many dimensions as `latents` has.
fn along(level: &Tensor, latents: &Tensor) -> Result<Tensor> {
    let mut extents = vec![1; latents.rank()];
    extents[0] = level.dim(0)?;
    Ok(level.reshape(extents)?)
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

    fn made(process: NoiseProcess, levels: [f32; 2]) -> Noised {
        process.noised(&pairs([[1.0, -2.0], [4.0, 0.0]]), &pairs([[3.0, 2.0], [0.0, 8.0]]), &tensor(&levels)).unwrap()
    }

    fn check(process: NoiseProcess, latents: [[f32; 2]; 2], timestep: [f32; 2], target: [[f32; 2]; 2]) {
        let noised = made(process, [0.25, 0.5]);
        assert_eq!(noised.latents.to_vec2::<f32>().unwrap(), latents, "{process:?}");
        assert_eq!(noised.timestep.to_vec1::<f32>().unwrap(), timestep, "{process:?}");
        assert_eq!(noised.target.to_vec2::<f32>().unwrap(), target, "{process:?}");
    }

    #[test]
    fn flows_by_hand() {
        let (latents, target) = ([[1.5, -1.0], [2.0, 4.0]], [[2.0, 4.0], [-4.0, 8.0]]);
        check(NoiseProcess::FlowMatching { time_scale: 1.0 }, latents, [0.25, 0.5], target);
        check(NoiseProcess::FlowMatching { time_scale: 1000.0 }, latents, [250.0, 500.0], target);
        check(NoiseProcess::ReversedFlow, latents, [0.75, 0.5], target.map(|row| row.map(|value| -value)));
    }

    /// x0 = (1, -2), noise = (3, 2) and (4, 0), (0, 8): what DDPMScheduler() of diffusers 0.42.1 makes of them.
    #[test]
    fn a_diffusion_adds_noise_as_diffusers() {
        let cases = [
            ([0.0, 0.9999], [0.0, 999.0], ADDED_AT_THE_ENDS),
            ([0.25, 1.0], [250.0, 999.0], ADDED_AT_A_QUARTER),
            ([0.0019, 0.5], [1.0, 500.0], ADDED_HALFWAY),
        ];
        for (levels, steps, want) in cases {
            let noised = made(NoiseProcess::Ddpm, levels);
            assert_eq!(noised.timestep.to_vec1::<f32>().unwrap(), steps);
            assert_eq!(noised.target.to_vec2::<f32>().unwrap(), [[3.0, 2.0], [0.0, 8.0]]);
            let got = noised.latents.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let close = got.iter().zip(want).all(|(got, want)| (got - want).abs() <= 1e-6 * want.abs().max(1.0));
            assert!(close, "{levels:?}: {got:?} instead of {want:?}");
        }
    }

    #[test]
    fn betas_and_abar_are_those_of_torch() {
        let betas = linear_betas(1e-4, 0.02, 1000);
        let abar = alphas_cumprod(&betas);
        for (step, beta, want) in TORCH {
            assert_eq!((betas[step], abar[step]), (beta, want), "step {step}");
        }
    }

    #[test]
    fn bf16_latents_are_mixed_in_f32() {
        let half = |tensor: Tensor| tensor.to_dtype(DType::BF16).unwrap();
        let (x0, noise) = (half(pairs([[1.0, 0.0], [0.0, 0.0]])), half(pairs([[0.0, 1.0], [0.0, 0.0]])));
        let noised = NoiseProcess::ReversedFlow.noised(&x0, &noise, &tensor(&[0.3, 0.0])).unwrap();
        assert_eq!(noised.latents.to_vec2::<f32>().unwrap(), [[0.7, 0.3], [0.0, 0.0]]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let flow = NoiseProcess::FlowMatching { time_scale: 1.0 };
        let (two, three) = (tensor(&[0.0, 1.0]), tensor(&[0.0, 0.5, 1.0]));
        let latents = pairs([[0.0; 2]; 2]);
        for (noise, level, name) in [(&two, &two, "noise"), (&latents, &three, "level"), (&latents, &latents, "level")]
        {
            let error = flow.noised(&latents, noise, level).unwrap_err().to_string();
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
