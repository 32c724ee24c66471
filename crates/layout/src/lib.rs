//! Which model a checkpoint holds, in which layout, and its tensors under canonical names.
//!
//! The same weights are published under different names. FLUX.1 exists as diffusers' `FluxTransformer2DModel`
//! (`transformer_blocks.0.attn.to_q.weight`), as Black Forest Labs' own file (`double_blocks.0.img_attn.qkv.weight`,
//! with query, key and value in one tensor) and as ComfyUI's file (the same after `model.diffusion_model.`). This crate
//! calls such a naming a *layout*. The rest of the workspace knows one naming only, the *canonical* one: diffusers'
//! names and shapes, or the authors' own for families that diffusers does not have.
//!
//! A checkpoint passes through it in four steps:
//!
//! 1. [`Manifests`] are the rules, read from TOML. `manifests/<family>.toml` lists a family's tensors and their shapes,
//!    where each key of `config.json` can be read from the tensors, the layouts with their renaming rules, and the
//!    variants with their sampling defaults. `manifests/components/` does the same for VAEs and text encoders. The code
//!    knows no family.
//! 2. [`Dequantized`] opens the checkpoint and presents fp8 weights as bf16 with their scales applied.
//! 3. [`detect()`] finds family, layout and variant from tensor names and shapes, and completes `config.json`:
//!    [`Identified`].
//! 4. [`Identified::canonical`] gives a [`CanonicalSource`]: a `TensorSource` under canonical names. It renames,
//!    splits, joins and reorders rows when a tensor is read, by moving bytes; weights are never computed with. Its
//!    [`LoadReport`] states what became of every tensor in the file, and what is missing or has the wrong shape.
//!    [`Identified::to_layout`] is the way back, into another layout.
//!
//! A file for ComfyUI may also hold the pipeline's VAE and text encoders: [`EmbeddedComponent`] opens them.
//! [`Inspection`] collects all of this for `clearform inspect`, with an estimate of what an image costs.
//! [`ParameterMap`] finds a parameter by its name in any layout, which adapters need.
//!
//! Folders depend on each other in one direction: `manifest` (the rules), `mapping` (rules applied to tensors),
//! `detect` (the choice between rules), `report` (what is printed).

mod detect;
mod error;
mod manifest;
mod mapping;
mod published;
mod report;

pub use detect::embedded::{EmbeddedComponent, OpenComponent};
pub use detect::hints::Hints;
pub use detect::{Identified, Sidecar, detect, detect_source};
pub use error::{LayoutError, Result};
pub use manifest::Manifests;
pub use manifest::conflict::ConfigConflict;
pub use manifest::family::{SamplingDefaults, Variant};
pub use manifest::pattern::glob;
pub use manifest::shape::ExpectedTensor;
pub use mapping::assembly::{CanonicalSource, ExportedSource, MappedSource};
pub use mapping::dequantized::Dequantized;
pub use mapping::load_report::{LoadReport, MissingTensor, ShapeMismatch, TensorOutcome, UncomputableTensor};
pub use mapping::parameter_map::{LayoutParameter, ParameterMap, RowSegment};
pub use mapping::prefix_view::PrefixView;
pub use published::PublishedModel;
pub use report::cost::{
    ClearCost, CostEstimate, DistillationEstimate, PipelineScale, WeightMemory, activation_bytes, attention_parameters,
    evaluation_teraflop,
};
pub use report::inspection::{Inspection, StorageFormat, UnusableComponent, UnusedTensor};
