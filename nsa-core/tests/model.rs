//! The model's configuration, tensors, counts, memory plan and rotary frequencies.

use nsa_core::model::{ModelConfig, PRESETS, param_counts};

fn preset(name: &str) -> ModelConfig {
    ModelConfig::preset(name).expect("a preset is valid")
}

#[test]
fn presets_are_valid_and_have_the_sizes_that_they_name() {
    let millions = |name| param_counts(&preset(name)).total as f64 / 1e6;
    for name in PRESETS {
        assert_eq!(preset(name).check_runnable().is_ok(), *name != "paper-27b");
    }
    for (name, low, high) in
        [("tiny-1m", 1.0, 1.5), ("small-10m", 9.5, 11.0), ("medium-45m", 44.0, 47.0), ("large-350m", 340.0, 360.0)]
    {
        assert!((low..high).contains(&millions(name)), "{name}: {} M", millions(name));
    }
    assert_eq!(param_counts(&preset("bench-4m")).total, 3_541_248);
    // The published checkpoint's count.
    assert_eq!(param_counts(&preset("smollm-135m")).total, 134_515_008);
}
