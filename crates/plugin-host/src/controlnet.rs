//! [`ControlNet`]: a network beside the model, opened by a plugin of `clearform.branch/1`, that gives residuals for blocks.

use crate::file::LentFile;
use crate::library::Library;
use crate::tensors::receive;
use crate::{Plugin, PluginError, Result};
use candle_core::Tensor;
use clearform_models::DenoiserInput;
use clearform_plugin_abi::dlpack::DLManagedTensorVersioned;
use clearform_plugin_abi::tensor::OwnedTensor;
use clearform_plugin_abi::{
    CONTROL_LATENTS, CONTROL_PIXELS, CONTROLNET_INTERFACE, ClearformBase, ClearformBranchInfo, ClearformBranchTable,
    ClearformStep as RawStep, ClearformText, FAILED, OK,
};
use clearform_weights::Checkpoint;
use serde_json::Value;
use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;

/// The model that a branch hangs on.
#[derive(Debug, Clone, Copy)]
pub struct BaseModel<'a> {
    /// Its family.
    pub family: &'a str,
    /// Its diffusers config.json.
    pub config: &'a Value,
    /// The attention that the branch shall have: `full`, or `clear:r=R`.
    pub attention: &'a str,
}

/// What a branch is controlled by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlKind {
    /// Latents, packed as the model takes its own: (batch, image tokens, channels).
    Latents,
    /// A picture, (batch, 3, height, width).
    Pixels,
}

/// What a branch takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ControlInput {
    /// Latents or a picture.
    pub kind: ControlKind,
    /// Channels of it.
    pub channels: usize,
    /// Modes that it knows; 0 if it takes none.
    pub modes: usize,
    /// The pixel values that black and white become, before the VAE if it takes latents.
    pub range: [f64; 2],
}

/// What a branch is given at one evaluation, beside the model's own input.
#[derive(Debug, Clone, Copy)]
pub struct Controls<'a> {
    /// As [`ControlInput`] asks for it.
    pub control: &'a Tensor,
    /// Mode of each picture, (batch, 1).
    pub mode: Option<&'a Tensor>,
    /// Guidance scale where the model's own input has none, (batch).
    pub guidance: Option<&'a Tensor>,
}

/// A tensor and the blocks of the model after which it is added to the image stream.
#[derive(Debug, Clone)]
pub struct Residual {
    /// (batch, image tokens, width), raster order, on the CPU.
    pub tensor: Tensor,
    /// From 0, in the order in which the model runs them.
    pub blocks: Vec<usize>,
}

/// An open branch.
pub struct ControlNet {
    library: Library,
    table: ClearformBranchTable,
    instance: *mut c_void,
    /// Lent to the instance, which is closed first.
    file: LentFile,
    input: ControlInput,
}

// SAFETY: the table's comments let any thread call an instance.
unsafe impl Send for ControlNet {}
// SAFETY: as above.
unsafe impl Sync for ControlNet {}

impl ControlNet {
    /// Loads `plugin` and lets it open `file` for the model `base`.
    ///
    /// # Errors
    /// The plugin does not keep to the boundary, or refuses the file or the model.
    pub fn open(plugin: &Plugin, file: Arc<Checkpoint>, base: BaseModel) -> Result<Self> {
        let library = Library::load(plugin, CONTROLNET_INTERFACE)?;
        // SAFETY: the library's interface is this one.
        let table: ClearformBranchTable = unsafe { library.table() }?;
        let open = library.function("open", table.open)?;
        library.function("close", table.close)?;
        library.function("residuals", table.residuals)?;
        let file = LentFile::new(file);
        let config = base.config.to_string();
        let lent = ClearformBase {
            struct_size: size_of::<ClearformBase>() as u32,
            reserved: 0,
            family: ClearformText::new(base.family),
            config: ClearformText::new(&config),
            attention: ClearformText::new(base.attention),
        };
        let mut instance = std::ptr::null_mut();
        // SAFETY: the host stands, the file does until close, and the base during the call.
        let status = unsafe { open(library.host(), file.table(), &raw const lent, &raw mut instance) };
        let bad = |reason| PluginError::BadAdapter { adapter: file.path().to_owned(), reason };
        library.outcome(status).map_err(|reason| bad(file.explain(reason)))?;
        let none = ControlInput { kind: ControlKind::Latents, channels: 0, modes: 0, range: [0.0, 1.0] };
        let mut controlnet = Self { library, table, instance, file, input: none };
        controlnet.input = controlnet.read_input()?;
        Ok(controlnet)
    }

    /// What it takes.
    pub fn input(&self) -> ControlInput {
        self.input
    }

    /// Its file or folder.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// What the plugin has to say since the last time.
    pub fn notes(&self) -> Vec<String> {
        self.library.notes()
    }

    /// One evaluation's residuals, unscaled.
    ///
    /// # Errors
    /// The plugin cannot use the input, or does not keep to the boundary.
    pub fn residuals(&self, input: &DenoiserInput, controls: Controls) -> Result<Vec<Residual>> {
        let function = self.library.function("residuals", self.table.residuals)?;
        let lent = LentStep::new(input, controls)?;
        let step = lent.step();
        let mut given = ReceivedResiduals::default();
        // SAFETY: the instance is open; the step's tensors stand in `lent`, and `given` does until the call is over.
        let status = unsafe { function(self.instance, &raw const step, Some(take), (&raw mut given).cast()) };
        let outcome = self.library.outcome(status);
        if let Some(refused) = given.refused {
            return Err(self.bad(refused.to_string()));
        }
        outcome.map_err(|reason| self.bad(reason))?;
        Ok(given.residuals)
    }

    fn read_input(&self) -> Result<ControlInput> {
        let function = self.library.function("info", self.table.info)?;
        let struct_size = size_of::<ClearformBranchInfo>() as u32;
        let mut info = ClearformBranchInfo { struct_size, control: 0, channels: 0, modes: 0, low: 0.0, high: 1.0 };
        // SAFETY: the instance is open, and the struct is ours.
        let status = unsafe { function(self.instance, &raw mut info) };
        self.library.outcome(status).map_err(|reason| self.bad(reason))?;
        let kind = match info.control {
            CONTROL_LATENTS => ControlKind::Latents,
            CONTROL_PIXELS => ControlKind::Pixels,
            other => return Err(self.library.bad(format!("its control {other} is neither latents nor pixels"))),
        };
        let (channels, modes) = (info.channels as usize, info.modes as usize);
        Ok(ControlInput { kind, channels, modes, range: [info.low, info.high] })
    }

    fn bad(&self, reason: String) -> PluginError {
        PluginError::BadAdapter { adapter: self.path().to_owned(), reason: self.file.explain(reason) }
    }
}

impl Drop for ControlNet {
    fn drop(&mut self) {
        if let Some(close) = self.table.close {
            // SAFETY: the instance is open, and nobody has it after this.
            unsafe { close(self.instance) }
        }
    }
}

impl std::fmt::Debug for ControlNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Branch").field("path", &self.path()).field("input", &self.input).finish_non_exhaustive()
    }
}

/// What a plugin gave during one call.
#[derive(Default)]
struct ReceivedResiduals {
    residuals: Vec<Residual>,
    refused: Option<PluginError>,
}

unsafe extern "C" fn take(
    context: *mut c_void,
    residual: *mut DLManagedTensorVersioned,
    blocks: *const u32,
    block_count: usize,
) -> i32 {
    // SAFETY: the context is the `ReceivedResiduals` of the call that this is within, and the tensor is ours.
    let (given, tensor) = unsafe { (&mut *context.cast::<ReceivedResiduals>(), receive(residual)) };
    let tensor = tensor.unwrap_or_else(|| Err(candle_core::Error::Msg("the plugin gave no tensor".to_owned()).into()));
    let count = if blocks.is_null() { 0 } else { block_count };
    // SAFETY: the plugin lends that many numbers for the call.
    let blocks = if count == 0 { &[] } else { unsafe { std::slice::from_raw_parts(blocks, count) } };
    let blocks = blocks.iter().map(|block| *block as usize).collect();
    match tensor {
        Ok(tensor) => {
            given.residuals.push(Residual { tensor, blocks });
            OK
        }
        Err(error) => {
            given.refused = Some(error);
            FAILED
        }
    }
}

/// The tensors of a step, as long as they are lent.
struct LentStep([Option<OwnedTensor>; 9]);

impl LentStep {
    fn new(input: &DenoiserInput, controls: Controls) -> Result<Self> {
        let conditions = &input.conditions;
        let lend = OwnedTensor::of_candle;
        let optional = |tensor: Option<&Tensor>| tensor.map(lend).transpose();
        Ok(Self([
            Some(lend(&input.latents)?),
            Some(lend(&input.timestep)?),
            optional(conditions.text.as_ref())?,
            optional(conditions.pooled.as_ref())?,
            optional(conditions.guidance.as_ref().or(controls.guidance))?,
            optional(conditions.image_ids.as_ref())?,
            optional(conditions.text_ids.as_ref())?,
            Some(lend(controls.control)?),
            optional(controls.mode)?,
        ]))
    }

    fn step(&self) -> RawStep {
        let raw = |tensor: &Option<OwnedTensor>| tensor.as_ref().map_or(std::ptr::null(), OwnedTensor::as_ptr);
        let [latents, timestep, text, pooled, guidance, image_ids, text_ids, control, mode] =
            self.0.each_ref().map(raw);
        let struct_size = size_of::<RawStep>() as u32;
        let reserved = 0;
        RawStep { struct_size, reserved, latents, timestep, text, pooled, guidance, image_ids, text_ids, control, mode }
    }
}
