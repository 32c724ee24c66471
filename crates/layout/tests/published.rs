//! Shapes of published models, which manifests state.

mod common;

use clearform_layout::ExpectedTensor;
use common::manifests;

/// Tensors and parameters of the files on the Hugging Face hub.
const PUBLISHED: [(&str, usize, usize); 7] = [
    ("flux-dev", 1160, 11_901_408_320),
    ("sd3-medium", 683, 2_084_951_104),
    ("sd3.5-medium", 909, 2_469_663_936),
    ("sd3.5-large", 1227, 8_146_280_768),
    ("pixart-alpha-1024", 611, 611_349_152),
    ("pixart-sigma", 603, 610_856_096),
    ("dit-xl-2-256", 538, 749_826_464),
];

#[test]
fn published_models_have_the_tensors_of_their_files() {
    for (name, tensors, parameters) in PUBLISHED {
        let model = manifests().published_model(name).unwrap();
        let expected = manifests().expected(&model.family, &model.config).unwrap();
        let needed: Vec<&ExpectedTensor> = expected.iter().filter(|tensor| !tensor.optional).collect();
        let elements = |tensor: &&ExpectedTensor| tensor.shape.iter().map(|size| size.unwrap()).product::<usize>();
        assert_eq!((needed.len(), needed.iter().map(elements).sum::<usize>()), (tensors, parameters), "{name}");
    }
    let error = manifests().published_model("flux2").unwrap_err().to_string();
    assert!(error.contains("unknown published model \"flux2\"; choose one of [\"dit-xl-2-256\""), "{error}");
}
