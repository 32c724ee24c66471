//! Makes pre-trained diffusion transformers linear: reads a checkpoint, replaces its attention by CLEAR's
//! (arXiv 2412.16112), distils it against the original, and runs the result with LoRAs and ControlNets.
//!
//! Each function is one command of the program `clearform`. It takes a struct of options, which are serde values with the
//! program's defaults, and an [`Observer`], which sees progress and may cancel; it returns a report.
//!
//! | function | options | returns |
//! |---|---|---|
//! | [`inspect()`] | [`SourceOptions`] | what a checkpoint is, and what it costs to run |
//! | [`convert()`] | [`ConvertOptions`] | a portable model with other attention, distilled |
//! | [`distill()`] | [`DistillOptions`] | the model, trained further |
//! | [`generate()`] | [`GenerateOptions`] | images |
//! | [`compare()`] | [`CompareOptions`] | how similar teacher and student are |
//! | [`transfer()`] | [`TransferOptions`] | what carries over: fine-tunes, LoRAs, ControlNets |
//! | [`extract_patch()`], [`apply_patch()`] | [`PatchOptions`] | distilled attention as a file, and onto other models |
//! | [`export()`] | [`ExportOptions`] | the transformer in one file, in another layout |
//! | [`verify()`] | | whether a portable model's files are as recorded |
//! | [`list_plugins()`], [`check_plugin()`] | [`PluginOptions`] | the plugins that open adapters |
//! | [`forward()`] | [`ForwardOptions`] | one evaluation of the transformer |
//!
//! Nothing is printed, and no output is left half-written: a model appears when it is complete. Where an error names an
//! option of the command line, as in "pass --components", set the field of that name ([`ConvertOptions::components`]);
//! `--no-distill` is [`ConvertOptions::training`] without a value, and `--dtype f32` is [`FloatDtype::F32`]. To hold a model in memory
//! for many images, open a [`Pipeline`] and [load](Pipeline::load) it.
//!
//! On a CPU, set the environment variable `CANDLE_NUM_THREADS` to 1 before the first call, as the command line does:
//! candle's own threads otherwise take processors from ours, which makes training a small model half as fast.
//!
//! ```no_run
//! use clearform::{ConvertOptions, GenerateOptions, Observer, Progress, Prompt, convert, generate};
//! use std::ops::ControlFlow;
//!
//! struct Percent;
//!
//! impl Observer for Percent {
//!     fn progress(&mut self, progress: &Progress) -> ControlFlow<()> {
//!         eprintln!("{:?}: {} of {}", progress.stage, progress.done, progress.total);
//!         ControlFlow::Continue(())
//!     }
//! }
//!
//! convert(&ConvertOptions::new("FLUX.1-dev", "FLUX.1-dev-clear"), &mut Percent)?;
//! let prompt = Prompt::Text("a lighthouse at dawn".to_owned());
//! let generated = generate(&GenerateOptions::new("FLUX.1-dev-clear", prompt), &mut Percent)?;
//! generated.save(&["out.png".into()])?;
//! # Ok::<(), clearform::ClearformError>(())
//! ```

mod adapters;
pub mod bench;
mod bundled_plugins;
pub mod chart;
mod compare;
mod compared_pair;
mod comparison_report;
mod conversion_record;
mod convert;
mod distill;
mod error;
pub mod evaluation;
mod export;
mod forecast;
mod forward;
mod generate;
mod guidance_effects;
mod inspect;
mod judge;
mod live_report;
mod observer;
mod options;
mod output_place;
pub mod page;
mod patch;
mod plugins;
mod prompt_notes;
mod published_memory;
mod recipe;
mod run_record;
mod sources;
mod training;
mod training_page;
mod training_report;
mod training_samples;
mod transfer;
mod verify;
mod window_gain;
mod written_model;

pub use adapters::{AdapterKind, AdapterOptions, AdapterSpec, ControlNetReport, LoraApplyMode, PluginOptions};
pub use clearform_attention::{AttentionError, AttentionPlan, Radius};
pub use clearform_convert::{ConversionReport, ConvertError, PatchMode};
pub use clearform_distill::{DistillError, LossEntry, Precision, SampleSet};
pub use clearform_layout::{Inspection, LayoutError};
pub use clearform_models::vae::{TilingMode, VaePrecision, VaeTiling};
pub use clearform_models::{FamilyRegistry, ImageSize, ModelError, Prompt};
pub use clearform_plugin_host::{AdapterReport, ExampleResults, PluginError};
pub use clearform_portable_model::{
    CopyMode, ImageVerdict, LevelErrors, Overwrite, PortableModelError, VerdictRecord, VerifyReport,
};
pub use clearform_runtime::image_file::read_parameters;
pub use clearform_runtime::{
    Adapters, ComponentFiles, GenerationParameters, LoadedPipeline, MemoryOptions, OffloadMode, Pipeline,
    PipelineOptions, Residency, RgbImage, RuntimeError,
};
pub use clearform_weights::WeightsError;
pub use compare::{CompareOptions, compare};
pub use comparison_report::{ComparedModel, ComparisonReport, ImagePair};
pub use convert::{ConvertOptions, ConvertReport, convert, preview_conversion};
pub use distill::{DistillOptions, distill};
pub use error::{ClearformError, Result};
pub use evaluation::EvaluationOptions;
pub use export::{ExportOptions, ExportReport, export};
pub use forward::{ForwardOptions, ForwardReport, forward};
pub use generate::{GenerateOptions, GeneratedImages, generate};
pub use inspect::inspect;
pub use observer::{Observer, Progress, Stage, StageNumber};
pub use options::{ComputeDevice, FloatDtype, SourceOptions, TrainingOptions};
pub use output_place::{
    Existing, OutputFile, OutputFolder, check_is_no_input, prepare_file, prepare_folder, prepare_image,
    prepare_tensor_file,
};
pub use patch::{ExtractedPatch, PatchOptions, apply_patch, extract_patch};
pub use plugins::{ListedPlugin, PluginCheck, PluginListing, check_plugin, list_plugins};
pub use published_memory::{PublishedMemory, published_memory};
pub use recipe::{ModelSize, Recipe};
pub use sources::{linear_plan, parse_plan};
pub use training_samples::prepare_samples;
pub use transfer::{TransferCondition, TransferOptions, TransferReport, TransferStudy, transfer};
pub use verify::verify;
pub use written_model::WrittenModel;
