//! [`ControlNetPlugin`]: a plugin of `clearform.branch/1`.

use super::instance::{close, guard, instance, put, write};
use super::{AdapterFile, Result};
use crate::dlpack::DLManagedTensorVersioned;
use crate::tensor::{BorrowedTensor, OwnedTensor};
use crate::{
    ClearformBase, ClearformBranchInfo, ClearformBranchTable, ClearformGiveResidual, ClearformHost, ClearformStep,
    ClearformText, OK,
};
use std::ffi::c_void;

/// The model that a branch hangs on.
#[derive(Debug, Clone)]
pub struct TargetModel {
    /// Its family ("flux").
    pub family: String,
    /// Its diffusers config.json.
    pub config: String,
    /// The attention that the branch shall have.
    pub attention: String,
}

/// One evaluation's input.
#[derive(Debug, Clone, Copy)]
pub struct StepInput<'a> {
    /// Noisy latents, (batch, image tokens, channels).
    pub latents: BorrowedTensor<'a>,
    /// (batch).
    pub timestep: BorrowedTensor<'a>,
    /// Text features, (batch, text tokens, channels).
    pub text: Option<BorrowedTensor<'a>>,
    /// Pooled text features, (batch, channels).
    pub pooled: Option<BorrowedTensor<'a>>,
    /// Guidance scale, (batch).
    pub guidance: Option<BorrowedTensor<'a>>,
    /// Places of the image tokens, (image tokens, 3).
    pub image_ids: Option<BorrowedTensor<'a>>,
    /// Places of the text tokens, (text tokens, 3).
    pub text_ids: Option<BorrowedTensor<'a>>,
    /// The control.
    pub control: BorrowedTensor<'a>,
    /// Mode of each picture, (batch, 1).
    pub mode: Option<BorrowedTensor<'a>>,
}

/// A residual and the numbers of the model's blocks after which it is added.
#[derive(Debug)]
pub struct BlockResidual {
    /// (batch, image tokens, width), raster order.
    pub tensor: OwnedTensor,
    /// From 0, in the order in which the model runs them.
    pub blocks: Vec<u32>,
}

/// What a branch takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ControlSpec {
    /// [`crate::CONTROL_LATENTS`] or [`crate::CONTROL_PIXELS`].
    pub control: u32,
    /// Channels of the control.
    pub channels: u32,
    /// Modes that it knows; 0 if it takes none.
    pub modes: u32,
    /// The pixel values that black and white become.
    pub range: [f64; 2],
}

/// A plugin of `clearform.branch/1`.
pub trait ControlNetPlugin: Send + Sync + Sized {
    /// Opens a file that the plugin's claims fit, for `model`.
    ///
    /// # Errors
    /// What is wrong with the file, or that it is for another model, and what to do.
    fn open(file: AdapterFile, model: TargetModel) -> Result<Self>;

    /// What it takes.
    fn takes(&self) -> ControlSpec;

    /// One evaluation's residuals.
    ///
    /// # Errors
    /// An input that it cannot use.
    fn residuals(&self, step: &StepInput) -> Result<Vec<BlockResidual>>;
}

impl ClearformBranchTable {
    /// The table of `T`.
    pub const fn of<T: ControlNetPlugin>() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            reserved: 0,
            open: Some(open_branch::<T>),
            close: Some(close::<T>),
            info: Some(info::<T>),
            residuals: Some(residuals::<T>),
        }
    }
}

// What follows is called by the host alone, which keeps to the comments of the tables: pointers are valid, instances
// come from `open` of the same table, and none is used after `close`. Each SAFETY below rests on that.

unsafe extern "C" fn open_branch<T: ControlNetPlugin>(
    host: *const ClearformHost,
    file: *const crate::ClearformFile,
    base: *const ClearformBase,
    out: *mut *mut c_void,
) -> i32 {
    guard(host, || {
        // SAFETY: the host's promise.
        let model = unsafe {
            let text = |text: ClearformText| text.as_str().unwrap_or_default().to_owned();
            TargetModel {
                family: text((*base).family),
                config: text((*base).config),
                attention: text((*base).attention),
            }
        };
        let opened = T::open(AdapterFile { file, host }, model)?;
        // SAFETY: the host's promise.
        unsafe { put(host, opened, out) };
        Ok(())
    })
}

unsafe extern "C" fn info<T: ControlNetPlugin>(pointer: *mut c_void, out: *mut ClearformBranchInfo) -> i32 {
    // SAFETY: the host's promise.
    let instance = unsafe { instance::<T>(pointer) };
    guard(instance.host, || {
        let ControlSpec { control, channels, modes, range: [low, high] } = instance.inner.takes();
        let struct_size = size_of::<ClearformBranchInfo>() as u32;
        // SAFETY: the host's promise.
        unsafe {
            write(out, ClearformBranchInfo { struct_size, control, channels, modes, low, high }, (*out).struct_size)
        };
        Ok(())
    })
}

unsafe extern "C" fn residuals<T: ControlNetPlugin>(
    pointer: *mut c_void,
    step: *const ClearformStep,
    give: Option<ClearformGiveResidual>,
    context: *mut c_void,
) -> i32 {
    // SAFETY: the host's promise.
    let instance = unsafe { instance::<T>(pointer) };
    guard(instance.host, || {
        let give = give.ok_or("the host takes no residuals")?;
        // SAFETY: the host's promise: the step and its tensors stand during the call.
        let input = unsafe { StepInput::new(&*step) }?;
        for BlockResidual { tensor, blocks } in instance.inner.residuals(&input)? {
            // SAFETY: the host's promise; it owns the tensor from here on, whatever it answers.
            let taken = unsafe { give(context, tensor.into_raw(), blocks.as_ptr(), blocks.len()) };
            if taken != OK {
                return Err("the host refused a residual".to_owned());
            }
        }
        Ok(())
    })
}

impl<'a> StepInput<'a> {
    /// # Safety
    /// The tensors of `step` stand for `'a`.
    unsafe fn new(step: &ClearformStep) -> Result<Self> {
        // SAFETY: the caller says so.
        let required = |tensor: *const DLManagedTensorVersioned| unsafe { BorrowedTensor::new(tensor) };
        let optional =
            |tensor: *const DLManagedTensorVersioned| (!tensor.is_null()).then(|| required(tensor)).transpose();
        Ok(Self {
            latents: required(step.latents)?,
            timestep: required(step.timestep)?,
            text: optional(step.text)?,
            pooled: optional(step.pooled)?,
            guidance: optional(step.guidance)?,
            image_ids: optional(step.image_ids)?,
            text_ids: optional(step.text_ids)?,
            control: required(step.control)?,
            mode: optional(step.mode)?,
        })
    }
}
