//! [`Branch`]: a plugin of `clearform.branch/1`.

use super::instance::{close, guard, instance, put, write};
use super::{File, Result};
use crate::dlpack::ManagedTensor;
use crate::tensor::{BorrowedTensor, OwnedTensor};
use crate::{Base, BranchInfo, BranchTable, GiveResidual, Host, OK, Step, Text};
use std::ffi::c_void;

/// The model that a branch hangs on.
#[derive(Debug, Clone)]
pub struct Model {
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
pub struct Residual {
    /// (batch, image tokens, width), raster order.
    pub tensor: OwnedTensor,
    /// From 0, in the order in which the model runs them.
    pub blocks: Vec<u32>,
}

/// What a branch takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Takes {
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
pub trait Branch: Send + Sync + Sized {
    /// Opens a file that the plugin's claims fit, for `model`.
    ///
    /// # Errors
    /// What is wrong with the file, or that it is for another model, and what to do.
    fn open(file: File, model: Model) -> Result<Self>;

    /// What it takes.
    fn takes(&self) -> Takes;

    /// One evaluation's residuals.
    ///
    /// # Errors
    /// An input that it cannot use.
    fn residuals(&self, step: &StepInput) -> Result<Vec<Residual>>;
}

impl BranchTable {
    /// The table of `T`.
    pub const fn of<T: Branch>() -> Self {
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

unsafe extern "C" fn open_branch<T: Branch>(
    host: *const Host,
    file: *const crate::File,
    base: *const Base,
    out: *mut *mut c_void,
) -> i32 {
    guard(host, || {
        // SAFETY: the host's promise.
        let model = unsafe {
            let text = |text: Text| text.as_str().unwrap_or_default().to_owned();
            Model { family: text((*base).family), config: text((*base).config), attention: text((*base).attention) }
        };
        let opened = T::open(File { file, host }, model)?;
        // SAFETY: the host's promise.
        unsafe { put(host, opened, out) };
        Ok(())
    })
}

unsafe extern "C" fn info<T: Branch>(pointer: *mut c_void, out: *mut BranchInfo) -> i32 {
    // SAFETY: the host's promise.
    let instance = unsafe { instance::<T>(pointer) };
    guard(instance.host, || {
        let Takes { control, channels, modes, range: [low, high] } = instance.inner.takes();
        let struct_size = size_of::<BranchInfo>() as u32;
        // SAFETY: the host's promise.
        unsafe { write(out, BranchInfo { struct_size, control, channels, modes, low, high }, (*out).struct_size) };
        Ok(())
    })
}

unsafe extern "C" fn residuals<T: Branch>(
    pointer: *mut c_void,
    step: *const Step,
    give: Option<GiveResidual>,
    context: *mut c_void,
) -> i32 {
    // SAFETY: the host's promise.
    let instance = unsafe { instance::<T>(pointer) };
    guard(instance.host, || {
        let give = give.ok_or("the host takes no residuals")?;
        // SAFETY: the host's promise: the step and its tensors stand during the call.
        let input = unsafe { StepInput::new(&*step) }?;
        for Residual { tensor, blocks } in instance.inner.residuals(&input)? {
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
    unsafe fn new(step: &Step) -> Result<Self> {
        // SAFETY: the caller says so.
        let required = |tensor: *const ManagedTensor| unsafe { BorrowedTensor::new(tensor) };
        let optional = |tensor: *const ManagedTensor| (!tensor.is_null()).then(|| required(tensor)).transpose();
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
