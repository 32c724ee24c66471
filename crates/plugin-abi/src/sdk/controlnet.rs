//! [`ControlNetPlugin`]: a plugin for `clearform.branch/1`.

use super::Result;
use super::file::AdapterFile;
use super::instance::{close, copy_to_host, guard, instance, store_instance};
use crate::dlpack::DLManagedTensorVersioned;
use crate::tensor::{BorrowedTensor, OwnedTensor};
use crate::{
    ClearformBase, ClearformBranchInfo, ClearformBranchTable, ClearformFile, ClearformGiveResidual, ClearformHost,
    ClearformStep, ClearformText, OK,
};
use std::ffi::c_void;

/// The model that the ControlNet runs beside.
#[derive(Debug, Clone)]
pub struct TargetModel {
    /// Family, such as "flux".
    pub family: String,
    /// The model's diffusers config.json.
    pub config: String,
    /// Attention for the ControlNet to use: `full`, or `clear:r=R`.
    pub attention: String,
}

/// The input of one evaluation.
#[derive(Debug, Clone, Copy)]
pub struct StepInput<'a> {
    /// Noisy latents, (batch, image tokens, channels).
    pub latents: BorrowedTensor<'a>,
    /// (batch).
    pub timestep: BorrowedTensor<'a>,
    /// Text embeddings, (batch, text tokens, channels).
    pub text: Option<BorrowedTensor<'a>>,
    /// Pooled text embeddings, (batch, channels).
    pub pooled: Option<BorrowedTensor<'a>>,
    /// Guidance scale, (batch).
    pub guidance: Option<BorrowedTensor<'a>>,
    /// Positions of the image tokens, (image tokens, 3).
    pub image_ids: Option<BorrowedTensor<'a>>,
    /// Positions of the text tokens, (text tokens, 3).
    pub text_ids: Option<BorrowedTensor<'a>>,
    /// The control, as [`ControlSpec`] describes it.
    pub control: BorrowedTensor<'a>,
    /// Mode of each image, (batch, 1).
    pub mode: Option<BorrowedTensor<'a>>,
}

/// A residual, and the blocks of the model whose outputs it is added to.
#[derive(Debug)]
pub struct BlockResidual {
    /// (batch, image tokens, width), raster order.
    pub tensor: OwnedTensor,
    /// Indexes of blocks, from 0, in the order in which the model runs them.
    pub blocks: Vec<u32>,
}

/// The control that a ControlNet expects.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ControlSpec {
    /// [`crate::CONTROL_LATENTS`] or [`crate::CONTROL_PIXELS`].
    pub control: u32,
    /// Channels of the control.
    pub channels: u32,
    /// Number of modes of a union ControlNet; 0 if it has none.
    pub modes: u32,
    /// Pixel values for black and white.
    pub range: [f64; 2],
}

/// A plugin for `clearform.branch/1`: a ControlNet, or a similar network that adds residuals to the model's blocks.
pub trait ControlNetPlugin: Send + Sync + Sized {
    /// Opens a file that matches the plugin's claims, for `model`.
    ///
    /// # Errors
    /// What is wrong with the file, or that it was made for another model, and what to do about it.
    fn open(file: AdapterFile, model: TargetModel) -> Result<Self>;

    /// The control that it expects.
    fn control_spec(&self) -> ControlSpec;

    /// The residuals of one evaluation.
    ///
    /// # Errors
    /// An input that it cannot use.
    fn residuals(&self, step: &StepInput) -> Result<Vec<BlockResidual>>;
}

impl ClearformBranchTable {
    /// The table of the plugin `T`.
    pub const fn of<T: ControlNetPlugin>() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            reserved: 0,
            open: Some(open::<T>),
            close: Some(close::<T>),
            info: Some(info::<T>),
            residuals: Some(residuals::<T>),
        }
    }
}

// Only the host calls the functions below, and it follows the comments of the tables: pointers are valid, instances
// come from `open` of the same table, and none is used after `close`. The SAFETY comments refer to this as the host's
// contract.

unsafe extern "C" fn open<T: ControlNetPlugin>(
    host: *const ClearformHost,
    file: *const ClearformFile,
    base: *const ClearformBase,
    out: *mut *mut c_void,
) -> i32 {
    guard(host, || {
        // SAFETY: the host's contract.
        let model = unsafe { TargetModel::new(&*base) };
        let plugin = T::open(AdapterFile { file, host }, model)?;
        // SAFETY: the host's contract.
        unsafe { store_instance(host, plugin, out) };
        Ok(())
    })
}

unsafe extern "C" fn info<T: ControlNetPlugin>(pointer: *mut c_void, out: *mut ClearformBranchInfo) -> i32 {
    // SAFETY: the host's contract.
    let instance = unsafe { instance::<T>(pointer) };
    guard(instance.host, || {
        let ControlSpec { control, channels, modes, range: [low, high] } = instance.plugin.control_spec();
        let struct_size = size_of::<ClearformBranchInfo>() as u32;
        let info = ClearformBranchInfo { struct_size, control, channels, modes, low, high };
        // SAFETY: the host's contract.
        unsafe { copy_to_host(out, info, (*out).struct_size) };
        Ok(())
    })
}

unsafe extern "C" fn residuals<T: ControlNetPlugin>(
    pointer: *mut c_void,
    step: *const ClearformStep,
    give: Option<ClearformGiveResidual>,
    context: *mut c_void,
) -> i32 {
    // SAFETY: the host's contract.
    let instance = unsafe { instance::<T>(pointer) };
    guard(instance.host, || {
        let give = give.ok_or("the host's function \"give\" is null")?;
        // SAFETY: the host's contract: the step and its tensors are valid during the call.
        let input = unsafe { StepInput::new(&*step) }?;
        for BlockResidual { tensor, blocks } in instance.plugin.residuals(&input)? {
            // SAFETY: the host's contract; the host owns the tensor from here on, whatever it returns.
            let status = unsafe { give(context, tensor.into_raw(), blocks.as_ptr(), blocks.len()) };
            if status != OK {
                return Err("the host rejected a residual".to_owned());
            }
        }
        Ok(())
    })
}

impl TargetModel {
    /// # Safety
    /// The texts of `base` are valid.
    unsafe fn new(base: &ClearformBase) -> Self {
        // SAFETY: guaranteed by the caller.
        let copy = |text: &ClearformText| unsafe { text.as_str() }.unwrap_or_default().to_owned();
        Self { family: copy(&base.family), config: copy(&base.config), attention: copy(&base.attention) }
    }
}

impl<'a> StepInput<'a> {
    /// # Safety
    /// The tensors of `step` are valid for `'a`.
    unsafe fn new(step: &ClearformStep) -> Result<Self> {
        let required = |name: &str, tensor: *const DLManagedTensorVersioned| {
            // SAFETY: guaranteed by the caller.
            unsafe { BorrowedTensor::from_raw(tensor) }.map_err(|reason| format!("input {name:?}: {reason}"))
        };
        let optional = |name: &str, tensor: *const DLManagedTensorVersioned| {
            (!tensor.is_null()).then(|| required(name, tensor)).transpose()
        };
        Ok(Self {
            latents: required("latents", step.latents)?,
            timestep: required("timestep", step.timestep)?,
            text: optional("text", step.text)?,
            pooled: optional("pooled", step.pooled)?,
            guidance: optional("guidance", step.guidance)?,
            image_ids: optional("image_ids", step.image_ids)?,
            text_ids: optional("text_ids", step.text_ids)?,
            control: required("control", step.control)?,
            mode: optional("mode", step.mode)?,
        })
    }
}
