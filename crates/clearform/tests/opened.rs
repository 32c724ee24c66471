//! Each file of a source is opened once per call. One test, so that no other opens files in this process meanwhile.
#![allow(clippy::unwrap_used)]

use clearform::{
    ConvertOptions, GenerateOptions, ImageSize, Pipeline, PipelineOptions, Prompt, SourceOptions, convert, generate,
    inspect,
};
use clearform_runtime::GenerateRequest;
use clearform_sampling::StepAction;
use clearform_weights::opened_checkpoints;
use std::path::Path;

#[test]
fn each_source_is_opened_once() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/mini-flux/base");
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let opened = |call: &mut dyn FnMut()| {
        let before = opened_checkpoints();
        call();
        opened_checkpoints() - before
    };
    // The transformer, and two text encoders and the VAE for their number formats.
    assert_eq!(opened(&mut || drop(inspect(&base, &SourceOptions::default(), &mut ()).unwrap())), 4, "inspect");
    let conversion = ConvertOptions { training: None, ..ConvertOptions::new(&base, &model) };
    assert_eq!(opened(&mut || drop(convert(&conversion, &mut ()).unwrap())), 4, "convert");
    // The transformer, two text encoders and the VAE.
    let prompt = Prompt::Text("cat face".to_owned());
    let image =
        GenerateOptions { width: Some(64), height: Some(64), steps: Some(1), ..GenerateOptions::new(&model, prompt) };
    assert_eq!(opened(&mut || drop(generate(&image, &mut ()).unwrap())), 4, "generate");

    // A loaded pipeline opens nothing for its second image, and draws the same.
    let request = GenerateRequest {
        prompt: image.prompt.clone(),
        negative: None,
        size: Some(ImageSize { height: 64, width: 64 }),
        steps: 1,
        guidance: 0.0,
        true_cfg_scale: 1.0,
        seed: 0,
        batch: 1,
        control_images: Vec::new(),
        control_mask: None,
    };
    let wanted = generate(&image, &mut ()).unwrap().images;
    let loaded = Pipeline::open(&model, PipelineOptions::default_options().unwrap()).unwrap().load().unwrap();
    let draw = || loaded.generate(&request, &mut |_| StepAction::Continue).unwrap();
    assert_eq!(draw(), wanted);
    assert_eq!(opened(&mut || assert_eq!(draw(), wanted)), 0, "a loaded pipeline");
}
