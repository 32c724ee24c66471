//! [`bench_vae`]: times the decoding of random latents.

use super::median_ms;
use crate::{ClearformError, ComputeDevice, Result};
use clearform_models::ImageSize;
use clearform_models::vae::{VaePrecision, VaeTiling, autoencoder};
use clearform_runtime::{Components, RuntimeError};
use clearform_sampling::TorchGenerator;
use serde::Serialize;
use serde_json::Value;
use std::fmt;
use std::ops::ControlFlow;
use std::path::PathBuf;

/// An autoencoder at several sizes.
#[derive(Debug, Clone)]
pub struct VaeBench {
    /// Portable model or diffusers folder.
    pub model: PathBuf,
    /// Width and height of the images, in pixels.
    pub sizes: Vec<usize>,
    /// Whether and how images are decoded in tiles.
    pub tiling: VaeTiling,
    /// What its convolutions multiply.
    pub precision: VaePrecision,
    /// Timed runs, after one warm-up run; 0 times the first.
    pub repeat: usize,
    /// Where it runs.
    pub device: ComputeDevice,
}

/// Times the decoding of random latents by the autoencoder of a model.
///
/// # Errors
/// The autoencoder cannot be read, or a size is no multiple of its reduction.
pub fn bench_vae(bench: &VaeBench) -> Result<VaeTable> {
    let components = Components::new(&bench.model, None);
    let spec = autoencoder(&config(&components, bench)?)?;
    let device = bench.device.open()?;
    let vae = spec.build(components.weights("vae")?.as_ref(), bench.precision.on(&device))?;
    let row = |size: &usize| {
        if *size == 0 || !size.is_multiple_of(spec.downscale()) {
            let reason = format!("--size {size}: expected a positive multiple of {}", spec.downscale());
            return Err(ClearformError::BadOption(reason));
        }
        let edge = size / spec.downscale();
        let latents = TorchGenerator::new(0).randn((1, spec.latent_channels(), edge, edge))?.to_device(&device)?;
        let tile = bench.tiling.tile(spec.as_ref(), ImageSize { height: *size, width: *size });
        let median_ms = median_ms(bench.repeat, &device, || {
            match tile {
                None => drop(vae.decode(&latents)?),
                Some(tile) => drop(vae.decode_in_tiles(&latents, tile, &mut |_| ControlFlow::Continue(()))?),
            }
            Ok(())
        })?;
        Ok(VaeRow { size: *size, median_ms })
    };
    Ok(VaeTable { rows: bench.sizes.iter().map(row).collect::<Result<_>>()? })
}

/// The autoencoder's config.
///
/// # Errors
/// The model has none.
fn config(components: &Components, bench: &VaeBench) -> Result<Value> {
    components.config("vae").map_err(|error| match error {
        RuntimeError::MissingComponent { .. } => ClearformError::BadOption(format!(
            "{}: expected a diffusers folder or a portable model with a folder vae, found none",
            bench.model.display()
        )),
        other => other.into(),
    })
}

/// One decoding.
#[derive(Debug, Serialize)]
pub struct VaeRow {
    /// Width and height of the image, in pixels.
    pub size: usize,
    /// Median, in milliseconds.
    pub median_ms: f64,
}

/// The result of [`bench_vae`].
#[derive(Debug, Serialize)]
pub struct VaeTable {
    /// One row per size.
    pub rows: Vec<VaeRow>,
}

impl fmt::Display for VaeTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |f: &mut fmt::Formatter<'_>, row: &VaeRow| {
            writeln!(f, "{:>5} x {:<5}  median {:>10.1} ms", row.size, row.size, row.median_ms)
        };
        self.rows.iter().try_for_each(|row| line(f, row))
    }
}
