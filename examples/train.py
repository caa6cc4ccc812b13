"""
Trains one stage of VW-LMM on data in LLaVA's format. Every stage is this script with another recipe:

    python examples/train.py --config examples/recipes/small_world/stage1.yaml

    accelerate launch --config_file examples/accelerate_configs/zero2.yaml \
        examples/train.py --config examples/recipes/vicuna_7b/stage1.yaml

Any line of a recipe can be overridden on the command line (`--learning_rate 1e-4`); `--help` lists them all.
"""

from dataclasses import dataclass, field

from transformers import set_seed
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from modeling_vwlmm.training import find_last_checkpoint
from processing_vwlmm import VWLMMProcessor, load_llava_dataset


@dataclass
class ScriptArguments:
    """What to train on, and for stage I what to start from. Later stages start from `model_name_or_path`."""

    json_file: str = field(metadata={"help": "Data in LLaVA's JSON format."})
    image_folder: str = field(metadata={"help": "Folder of the images that the JSON file names."})
    on_bad_image: str = field(default="raise", metadata={"help": "'raise' or 'skip' samples whose image is broken."})
    vision_tower: str | None = field(default=None, metadata={"help": "Stage I: pretrained vision tower."})
    language_model: str | None = field(default=None, metadata={"help": "Stage I: pretrained LLM."})
    conversation_template: str = field(
        default="vicuna_v1", metadata={"help": "Stage I: template of conversations, 'vicuna_v1' or 'mistral'."}
    )
    use_pseudo_image_features: bool | None = field(
        default=None, metadata={"help": "Whether the decoder reads pseudo image features. By default as before."}
    )


def main(args: list[str] | None = None) -> None:
    """Trains the stage that the command line, or `args` in its place, describes."""
    parser = TrlParser((ScriptArguments, VWLMMTrainingArguments, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config(args)
    set_seed(training_args.seed)  # stage I draws adapter and VM head
    dataset = load_llava_dataset(
        script_args.json_file, script_args.image_folder, on_bad_image=script_args.on_bad_image
    )
    training_args.check_columns(dataset)  # before any weight is loaded
    dtype = model_args.dtype or "float32"
    if model_args.model_name_or_path is None:
        processor = VWLMMProcessor.from_vision_text_pretrained(
            script_args.vision_tower, script_args.language_model, chat_template=script_args.conversation_template
        )
        model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
            script_args.vision_tower,
            script_args.language_model,
            image_token_index=processor.image_token_id,
            dtype=dtype,
        )
    else:
        processor = VWLMMProcessor.from_pretrained(model_args.model_name_or_path)
        model = VWLMMForConditionalGeneration.from_pretrained(
            model_args.model_name_or_path,
            dtype=dtype,
            attn_implementation=model_args.attn_implementation,
            quantization_config=get_quantization_config(model_args),
        )
    if script_args.use_pseudo_image_features is not None:
        model.config.use_pseudo_image_features = script_args.use_pseudo_image_features

    trainer = VWLMMTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
    )
    # An interrupted run goes on from its last checkpoint that is whole, or from the one that is asked for.
    checkpoint = training_args.resume_from_checkpoint or find_last_checkpoint(training_args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
