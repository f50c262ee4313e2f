//! Checkpoints that are damaged, foreign or incomplete.

use crate::kit;
use nsa_core::model::{WEIGHTS_FILE, WEIGHTS_INDEX_FILE};
use nsa_train::checkpoint::{self, OPTIMIZER_FILE, STATE_FILE};
use nsa_train::trainer::Trainer;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::fs;
use std::path::Path;

fn saved(folder: &Path) -> std::path::PathBuf {
    let mut trainer = kit::trainer(folder, kit::config(|_| {}), kit::options());
    kit::steps(&mut trainer, 1);
    trainer.save(&folder.join("run")).unwrap()
}

fn error(folder: &Path) -> String {
    checkpoint::load(folder).unwrap_err().to_string()
}

#[test]
fn damaged_files_are_errors_that_name_them() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = saved(folder.path());
    for name in [WEIGHTS_FILE, OPTIMIZER_FILE] {
        let path = checkpoint.join(name);
        let good = fs::read(&path).unwrap();
        fs::write(&path, &good[..good.len() - 3]).unwrap();
        assert!(error(&checkpoint).contains(name), "truncated");
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(&path, flipped).unwrap();
        let message = error(&checkpoint);
        assert!(message.contains(name) && message.contains("SHA-256"), "{message}");
        fs::write(&path, "").unwrap();
        assert!(error(&checkpoint).contains(name), "empty");
        fs::remove_file(&path).unwrap();
        assert!(error(&checkpoint).contains(name), "missing");
        fs::write(&path, good).unwrap();
    }
    checkpoint::load(&checkpoint).unwrap();
    fs::write(checkpoint.join(STATE_FILE), "{}").unwrap();
    assert!(error(&checkpoint).contains(STATE_FILE));
}

/// Rewrites the model's tensors.
fn rewrite(checkpoint: &Path, change: impl Fn(&str, TensorView<'_>) -> Option<(String, Dtype, Vec<usize>, Vec<u8>)>) {
    let path = checkpoint.join(WEIGHTS_FILE);
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<_> = file.tensors().into_iter().filter_map(|(name, view)| change(&name, view)).collect();
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn keep(name: &str, view: &TensorView<'_>) -> (String, Dtype, Vec<usize>, Vec<u8>) {
    (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec())
}

#[test]
fn tensors_that_do_not_fit_are_errors_that_name_them() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = saved(folder.path());
    let good = fs::read(checkpoint.join(WEIGHTS_FILE)).unwrap();
    let params = checkpoint::load(&checkpoint).unwrap().params;
    let config = checkpoint::load_config(&checkpoint).unwrap();
    let victim = "model.layers.1.mlp.up_proj.weight";
    let load = || checkpoint::load_params(&checkpoint, &config);
    let check = |what: &str| {
        let message = load().unwrap_err().to_string();
        assert!(message.contains(what) && message.contains(WEIGHTS_FILE), "{message}");
        fs::write(checkpoint.join(WEIGHTS_FILE), &good).unwrap();
        message
    };

    rewrite(&checkpoint, |name, view| (name != victim).then(|| keep(name, &view)));
    assert!(check(victim).contains("missing"));
    rewrite(&checkpoint, |name, view| {
        let (name, dtype, mut shape, data) = keep(name, &view);
        if name == victim {
            shape.reverse();
        }
        Some((name, dtype, shape, data))
    });
    assert!(check(victim).contains("[24, 20], expected [20, 24]"));
    rewrite(&checkpoint, |name, view| {
        let (name, dtype, shape, data) = keep(name, &view);
        Some((name.clone(), if name == victim { Dtype::I32 } else { dtype }, shape, data))
    });
    assert!(check(victim).contains("I32"));
    rewrite(&checkpoint, |name, view| {
        let (name, dtype, shape, data) = keep(name, &view);
        Some((if name == victim { "other".to_owned() } else { name }, dtype, shape, data))
    });
    check(victim);

    // Half precision is read for what it holds.
    rewrite(&checkpoint, |name, view| {
        let (name, _, shape, data) = keep(name, &view);
        let narrow = |bytes: &[u8]| half::bf16::from_f32(f32::from_le_bytes(bytes.try_into().unwrap())).to_le_bytes();
        Some((name, Dtype::BF16, shape, data.chunks(4).flat_map(narrow).collect()))
    });
    let narrowed: Vec<f32> = params.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
    assert_eq!(load().unwrap(), narrowed);
    fs::write(checkpoint.join(WEIGHTS_FILE), &good).unwrap();
    assert_eq!(load().unwrap(), params);
}

/// As other libraries save larger models: several files, and an index of which has what.
#[test]
fn parameters_of_several_files() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = saved(folder.path());
    let config = checkpoint::load_config(&checkpoint).unwrap();
    let params = checkpoint::load_params(&checkpoint, &config).unwrap();
    let bytes = fs::read(checkpoint.join(WEIGHTS_FILE)).unwrap();
    fs::remove_file(checkpoint.join(WEIGHTS_FILE)).unwrap();
    let whole = SafeTensors::deserialize(&bytes).unwrap();
    let [first, second] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let file_of = |name: &str| if name.contains("layers.1") { second } else { first };
    let write = |file: &str, belongs: &dyn Fn(&str) -> bool| {
        let tensors = whole.tensors().into_iter().filter(|(name, _)| belongs(name));
        fs::write(checkpoint.join(file), safetensors::serialize(tensors, None).unwrap()).unwrap();
    };
    write(first, &|name| file_of(name) == first);
    write(second, &|name| file_of(name) == second);
    let map: std::collections::BTreeMap<_, _> = whole.names().into_iter().map(|name| (name, file_of(name))).collect();
    let index = serde_json::json!({ "metadata": { "total_size": bytes.len() }, "weight_map": map });
    fs::write(checkpoint.join(WEIGHTS_INDEX_FILE), index.to_string()).unwrap();
    assert_eq!(checkpoint::load_params(&checkpoint, &config).unwrap(), params);

    let message = || checkpoint::load_params(&checkpoint, &config).unwrap_err().to_string();
    let victim = "model.layers.1.mlp.up_proj.weight";
    write(second, &|name| file_of(name) == second && name != victim);
    assert_eq!(message(), format!("{}: tensor `{victim}`: missing", checkpoint.display()));
    write(second, &|name| file_of(name) == second || name == "model.norm.weight");
    let path = checkpoint.join(second);
    assert_eq!(message(), format!("{}: tensor `model.norm.weight`: is in another file, too", path.display()));
    fs::remove_file(&path).unwrap();
    assert_eq!(message(), format!("{}: cannot be read", path.display()));
}

#[test]
fn other_text_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = saved(folder.path());
    let loaded = checkpoint::load(&checkpoint).unwrap();
    let mut data = kit::data(folder.path(), 1);
    data.state.hash = "0".repeat(64);
    let error = Trainer::resume(&kit::backend(), loaded, data).unwrap_err().to_string();
    assert!(error.contains("text of hash") && error.contains("step-00000001"), "{error}");
}

#[test]
fn incomplete_checkpoints_are_not_seen() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = saved(folder.path());
    let run = checkpoint.parent().unwrap();
    for name in [".unfinished-1-step-00000009", "step-9", "step-00000009x", "step-"] {
        fs::create_dir(run.join(name)).unwrap();
    }
    fs::write(run.join("step-00000010"), "a file").unwrap();
    assert_eq!(checkpoint::list(run).unwrap(), [(1, checkpoint.clone())]);
    assert_eq!(checkpoint::resolve(run).unwrap(), checkpoint);
    assert_eq!(checkpoint::resolve(&checkpoint).unwrap(), checkpoint);
    assert!(checkpoint::resolve(folder.path()).is_err());
}

#[test]
fn saving_the_same_step_again_replaces_it_and_a_failure_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = kit::trainer(folder.path(), kit::config(|_| {}), kit::options());
    let run = folder.path().join("run");
    let first = trainer.save(&run).unwrap();
    fs::write(first.join("stray"), "").unwrap();
    assert_eq!(trainer.save(&run).unwrap(), first);
    assert!(!first.join("stray").exists());
    kit::steps(&mut trainer, 1);
    // A folder cannot be made below a file.
    let blocked = folder.path().join("blocked");
    fs::write(&blocked, "").unwrap();
    assert!(trainer.save(&blocked).is_err());
    let names: Vec<_> = fs::read_dir(&run).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["step-00000000"]);
    checkpoint::load(&first).unwrap();
}
