//! [`ControlNet`]: a ControlNet file opened by a plugin of `clearform.branch/1`. It computes residuals for the model's
//! blocks.

use crate::file::PluginFile;
use crate::loaded_plugin::LoadedPlugin;
use crate::tensors::receive;
use crate::{Plugin, PluginError, Result};
use candle_core::Tensor;
use clearform_models::DenoiserInput;
use clearform_plugin_abi::dlpack::DLManagedTensorVersioned;
use clearform_plugin_abi::tensor::OwnedTensor;
use clearform_plugin_abi::{
    CONTROL_LATENTS, CONTROL_PIXELS, CONTROLNET_INTERFACE, ClearformBase, ClearformBranchInfo, ClearformBranchTable,
    ClearformStep, ClearformText, EMBEDDED_LATENTS, FAILED, OK, UNSHIFTED_CONTROL, ZERO_POOLED,
};
use clearform_weights::{Checkpoint, TensorSource};
use serde_json::Value;
use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;

/// The model that a ControlNet runs beside.
#[derive(Debug, Clone, Copy)]
pub struct BaseModel<'a> {
    /// Family, such as "flux".
    pub family: &'a str,
    /// The model's diffusers config.json.
    pub config: &'a Value,
    /// Attention for the ControlNet to use: `full`, or `clear:r=R`.
    pub attention: &'a str,
}

/// What a ControlNet takes: pixels or latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlKind {
    /// Latents in the form of the model's own: (batch, image tokens, channels) where it takes packed latents, else
    /// (batch, channels, height, width).
    Latents,
    /// An image, (batch, 3, height, width).
    Pixels,
}

/// The control that a ControlNet expects.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ControlInput {
    /// Latents or an image.
    pub kind: ControlKind,
    /// Channels of the control.
    pub channels: usize,
    /// Number of modes of a union ControlNet; 0 if it has none.
    pub modes: usize,
    /// Pixel values for black and white; the input of the VAE if the control is latents.
    pub range: [f64; 2],
    /// Whether control latents are scaled as the model's own, but not shifted.
    pub unshifted: bool,
    /// Whether the pooled text that it gets is zero.
    pub zero_pooled: bool,
    /// Whether it takes the latents as the model embeds them, [`Controls::embedded`].
    pub embedded_latents: bool,
}

/// The input of a ControlNet at one evaluation, in addition to the model's own.
#[derive(Debug, Clone, Copy)]
pub struct Controls<'a> {
    /// The control, as [`ControlInput`] describes it.
    pub control: &'a Tensor,
    /// Mode of each image, (batch, 1).
    pub mode: Option<&'a Tensor>,
    /// Guidance scale, (batch), if the model's own input has none.
    pub guidance: Option<&'a Tensor>,
    /// The latents as the model embeds them, (batch, image tokens, width) in raster order.
    pub embedded: Option<&'a Tensor>,
}

/// A residual, and the blocks of the model whose image stream it is added to.
#[derive(Debug, Clone)]
pub struct Residual {
    /// (batch, image tokens, width), raster order, on the CPU.
    pub tensor: Tensor,
    /// Indexes of blocks, from 0, in the order in which the model runs them.
    pub blocks: Vec<usize>,
}

/// A ControlNet file that a plugin has opened.
pub struct ControlNet {
    plugin: LoadedPlugin,
    table: ClearformBranchTable,
    instance: *mut c_void,
    /// Borrowed by the instance, which `drop` closes before this is dropped.
    file: PluginFile,
    input: ControlInput,
}

// SAFETY: the interface allows an instance to be used from any thread.
unsafe impl Send for ControlNet {}
// SAFETY: as above.
unsafe impl Sync for ControlNet {}

impl ControlNet {
    /// Loads `plugin` and lets it open `file` for the model `base`.
    ///
    /// # Errors
    /// The plugin violates the plugin interface, or rejects the file or the model.
    pub fn open(plugin: &Plugin, file: Arc<Checkpoint>, base: BaseModel) -> Result<Self> {
        let plugin = LoadedPlugin::load(plugin, CONTROLNET_INTERFACE)?;
        // SAFETY: this is the table of the plugin's interface.
        let table: ClearformBranchTable = unsafe { plugin.table() }?;
        let open = plugin.function("open", table.open)?;
        plugin.function("close", table.close)?;
        plugin.function("residuals", table.residuals)?;
        let own_config = file.config().map_or_else(String::new, ToString::to_string);
        let file = PluginFile::new(file, own_config)?;
        let config = base.config.to_string();
        let base = base.to_c(&config);
        let mut instance = std::ptr::null_mut();
        // SAFETY: host and file outlive the instance, and the base the call.
        let status = unsafe { open(plugin.host(), file.table(), &raw const base, &raw mut instance) };
        plugin.check_status(status).map_err(|reason| {
            let reason = file.explain(reason);
            PluginError::BadAdapter { adapter: file.path().to_owned(), reason }
        })?;
        let mut controlnet = Self { plugin, table, instance, file, input: ControlInput::UNKNOWN };
        controlnet.input = controlnet.read_input()?;
        Ok(controlnet)
    }

    /// The control that it expects.
    pub fn input(&self) -> ControlInput {
        self.input
    }

    /// The ControlNet's file or folder.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The tensors of the file.
    pub fn tensors(&self) -> &dyn TensorSource {
        self.file.tensors()
    }

    /// The plugin's messages to the user since the last call, with the path of the file.
    pub fn notes(&self) -> Vec<String> {
        let notes = self.plugin.notes().into_iter();
        notes.map(|note| format!("{}: {note}", self.path().display())).collect()
    }

    /// The residuals of one evaluation, unscaled.
    ///
    /// # Errors
    /// The plugin cannot use the input, or violates the plugin interface.
    pub fn residuals(&self, input: &DenoiserInput, controls: Controls) -> Result<Vec<Residual>> {
        let residuals = self.plugin.function("residuals", self.table.residuals)?;
        let tensors = StepTensors::new(input, controls, self.input.zero_pooled)?;
        let step = tensors.step();
        let mut received = ReceivedResiduals::default();
        // SAFETY: the instance is open; the step's tensors and `received` outlive the call.
        let status =
            unsafe { residuals(self.instance, &raw const step, Some(receive_residual), (&raw mut received).cast()) };
        let outcome = self.plugin.check_status(status);
        if let Some(error) = received.error {
            return Err(self.error(error.to_string()));
        }
        outcome.map_err(|reason| self.error(reason))?;
        Ok(received.residuals)
    }

    fn read_input(&self) -> Result<ControlInput> {
        let describe = self.plugin.function("info", self.table.info)?;
        let mut info = ClearformBranchInfo { high: 1.0, ..ClearformBranchInfo::EMPTY };
        // SAFETY: the instance is open, and the struct is ours.
        let status = unsafe { describe(self.instance, &raw mut info) };
        self.plugin.check_status(status).map_err(|reason| self.error(reason))?;
        ControlInput::of(&info).map_err(|reason| self.plugin.error(reason))
    }

    fn error(&self, reason: String) -> PluginError {
        PluginError::BadAdapter { adapter: self.path().to_owned(), reason: self.file.explain(reason) }
    }
}

impl ControlInput {
    /// Before the plugin has described it.
    const UNKNOWN: Self = Self {
        kind: ControlKind::Latents,
        channels: 0,
        modes: 0,
        range: [0.0, 1.0],
        unshifted: false,
        zero_pooled: false,
        embedded_latents: false,
    };

    /// What `info` describes; the error says what is wrong with it.
    fn of(info: &ClearformBranchInfo) -> std::result::Result<Self, String> {
        let kind = match info.control {
            CONTROL_LATENTS => ControlKind::Latents,
            CONTROL_PIXELS => ControlKind::Pixels,
            other => return Err(format!("expected a control of kind 1 (latents) or 2 (pixels), found {other}")),
        };
        let unknown = info.flags & !(UNSHIFTED_CONTROL | ZERO_POOLED | EMBEDDED_LATENTS);
        if unknown != 0 {
            return Err(format!(
                "it asks for inputs that this version does not know (flags {unknown:#x}): get a newer one"
            ));
        }
        let has = |flag: u32| info.flags & flag != 0;
        Ok(Self {
            kind,
            channels: info.channels as usize,
            modes: info.modes as usize,
            range: [info.low, info.high],
            unshifted: has(UNSHIFTED_CONTROL),
            zero_pooled: has(ZERO_POOLED),
            embedded_latents: has(EMBEDDED_LATENTS),
        })
    }
}

impl BaseModel<'_> {
    /// The C struct, which borrows from `self` and from the text of its config.
    fn to_c(self, config: &str) -> ClearformBase {
        ClearformBase {
            struct_size: size_of::<ClearformBase>() as u32,
            reserved: 0,
            family: ClearformText::new(self.family),
            config: ClearformText::new(config),
            attention: ClearformText::new(self.attention),
        }
    }
}

impl Drop for ControlNet {
    fn drop(&mut self) {
        if let Some(close) = self.table.close {
            // SAFETY: the instance is open, and not used after this.
            unsafe { close(self.instance) }
        }
    }
}

impl std::fmt::Debug for ControlNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlNet").field("path", &self.path()).field("input", &self.input).finish_non_exhaustive()
    }
}

/// The residuals that a plugin passes during one call.
#[derive(Default)]
struct ReceivedResiduals {
    residuals: Vec<Residual>,
    error: Option<PluginError>,
}

/// The host's `give`: receives one residual.
unsafe extern "C" fn receive_residual(
    context: *mut c_void,
    residual: *mut DLManagedTensorVersioned,
    blocks: *const u32,
    block_count: usize,
) -> i32 {
    // SAFETY: the context is the `ReceivedResiduals` of the current call.
    let received = unsafe { &mut *context.cast::<ReceivedResiduals>() };
    // SAFETY: the host owns the tensor.
    let tensor = unsafe { receive(residual) };
    let missing = || Err(candle_core::Error::Msg("the plugin returned a null pointer as residual".to_owned()).into());
    // SAFETY: the indexes are valid during the call.
    let blocks = unsafe { block_indexes(blocks, block_count) };
    match tensor.unwrap_or_else(missing) {
        Ok(tensor) => {
            received.residuals.push(Residual { tensor, blocks });
            OK
        }
        Err(error) => {
            received.error = Some(error);
            FAILED
        }
    }
}

/// # Safety
/// `blocks` is null, or valid for `count` indexes.
unsafe fn block_indexes(blocks: *const u32, count: usize) -> Vec<usize> {
    if blocks.is_null() || count == 0 {
        return Vec::new();
    }
    // SAFETY: guaranteed by the caller.
    let blocks = unsafe { std::slice::from_raw_parts(blocks, count) };
    blocks.iter().map(|block| *block as usize).collect()
}

/// Owns the tensors that a [`ClearformStep`] points to.
struct StepTensors {
    latents: OwnedTensor,
    timestep: OwnedTensor,
    text: Option<OwnedTensor>,
    pooled: Option<OwnedTensor>,
    guidance: Option<OwnedTensor>,
    image_ids: Option<OwnedTensor>,
    text_ids: Option<OwnedTensor>,
    control: OwnedTensor,
    mode: Option<OwnedTensor>,
    embedded: Option<OwnedTensor>,
}

impl StepTensors {
    fn new(input: &DenoiserInput, controls: Controls, zero_pooled: bool) -> Result<Self> {
        let conditions = &input.conditions;
        let zeros = conditions.pooled.as_ref().filter(|_| zero_pooled).map(Tensor::zeros_like).transpose()?;
        let optional = |tensor: Option<&Tensor>| tensor.map(OwnedTensor::from_candle).transpose();
        Ok(Self {
            latents: OwnedTensor::from_candle(&input.latents)?,
            timestep: OwnedTensor::from_candle(&input.timestep)?,
            text: optional(conditions.text.as_ref())?,
            pooled: optional(zeros.as_ref().or(conditions.pooled.as_ref()))?,
            guidance: optional(conditions.guidance.as_ref().or(controls.guidance))?,
            image_ids: optional(conditions.image_ids.as_ref())?,
            text_ids: optional(conditions.text_ids.as_ref())?,
            control: OwnedTensor::from_candle(controls.control)?,
            mode: optional(controls.mode)?,
            embedded: optional(controls.embedded)?,
        })
    }

    /// The C struct, valid as long as `self` is.
    fn step(&self) -> ClearformStep {
        let pointer = |tensor: &Option<OwnedTensor>| tensor.as_ref().map_or(std::ptr::null(), OwnedTensor::as_ptr);
        ClearformStep {
            latents: self.latents.as_ptr(),
            timestep: self.timestep.as_ptr(),
            text: pointer(&self.text),
            pooled: pointer(&self.pooled),
            guidance: pointer(&self.guidance),
            image_ids: pointer(&self.image_ids),
            text_ids: pointer(&self.text_ids),
            control: self.control.as_ptr(),
            mode: pointer(&self.mode),
            embedded: pointer(&self.embedded),
            ..ClearformStep::EMPTY
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn flags_say_what_a_controlnet_takes() {
        let info = |flags| ClearformBranchInfo { control: CONTROL_LATENTS, flags, ..ClearformBranchInfo::EMPTY };
        let taken = |flags| {
            let input = ControlInput::of(&info(flags)).unwrap();
            [input.unshifted, input.zero_pooled, input.embedded_latents]
        };
        assert_eq!(taken(0), [false; 3]);
        assert_eq!(taken(UNSHIFTED_CONTROL), [true, false, false]);
        assert_eq!(taken(ZERO_POOLED), [false, true, false]);
        assert_eq!(taken(EMBEDDED_LATENTS), [false, false, true]);
        let error = ControlInput::of(&info(EMBEDDED_LATENTS | 0x100)).unwrap_err();
        assert!(error.contains("flags 0x100"), "{error}");
        let error = ControlInput::of(&ClearformBranchInfo::EMPTY).unwrap_err();
        assert!(error.contains("expected a control of kind 1 (latents) or 2 (pixels), found 0"), "{error}");
    }
}
