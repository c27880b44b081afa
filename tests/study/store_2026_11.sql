-- Two studies as the version before the moves of November 2026 (its folders: search, workers) stored them: trials that were
-- trained, stopped, collapsed, failed, given back with a checkpoint and after a fault, and one of a dead worker.
BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v3.2.0.a');
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'old');
INSERT INTO "studies" VALUES(2,'cells');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_directions" VALUES(1,'MINIMIZE',1,0);
INSERT INTO "study_directions" VALUES(2,'MINIMIZE',1,1);
INSERT INTO "study_directions" VALUES(3,'MINIMIZE',1,2);
INSERT INTO "study_directions" VALUES(4,'MAXIMIZE',1,3);
INSERT INTO "study_directions" VALUES(5,'MINIMIZE',2,0);
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_system_attributes" VALUES(1,1,'study:metric_names','["l0", "fvu@blocks.0.hook_resid_pre", "fvu@blocks.1.hook_resid_pre", "ce_recovered"]');
INSERT INTO "study_system_attributes" VALUES(2,1,'saeopt:spec','"{\"base\": {\"activations\": {\"cache\": \"auto\", \"cache_max_gb\": 50.0, \"dtype\": \"auto\"}, \"adam_betas\": [0.9, 0.99], \"as_typed\": {\"/home/somebody/sweeps/model\": \"model\", \"/home/somebody/sweeps/output\": \"output\", \"/home/somebody/sweeps/text.jsonl\": \"text.jsonl\"}, \"ce_ablation\": \"unmasked\", \"cooldown_samples\": null, \"data\": {\"column_name\": \"text\", \"context_length\": 16, \"dataset_name\": \"/home/somebody/sweeps/text.jsonl\", \"eval_batch_size\": 20, \"eval_column_name\": null, \"eval_dataset_name\": null, \"eval_split\": null, \"is_tokenized\": false, \"join_documents\": true, \"mask_norm_outliers\": null, \"mask_special_tokens\": true, \"n_eval_samples\": 16, \"n_train_samples\": 128, \"prepend_bos\": false, \"seed\": null, \"separator\": \"auto\", \"shuffle_buffer_tokens\": 0, \"shuffle_documents\": true, \"skip_first_positions\": 0, \"split\": \"train\", \"streaming\": false, \"subset\": null, \"text_unit\": \"auto\", \"token_dtype\": null, \"tokenizer_name\": null, \"train_batch_size\": 4}, \"eval_every_n_samples\": 0, \"gradient_accumulation_steps\": 1, \"keep_checkpoints\": null, \"legacy_scaling\": null, \"lm_batch_size\": null, \"lm_dtype\": \"auto\", \"lm_processing\": \"raw\", \"log_every_n_grad_steps\": 4, \"lr\": 0.001, \"lr_schedule\": \"constant\", \"max_grad_norm\": 1.0, \"min_lr_factor\": 0.0, \"mixed_precision\": \"auto\", \"performance\": {\"compile\": \"auto\", \"graphs\": \"auto\", \"stack\": \"auto\"}, \"recipe\": 2, \"saes\": {\"bias_init\": \"geometric_median\", \"dead_after_tokens\": null, \"decoder_norm\": null, \"dict_size_to_input_ratio\": 2.0, \"init_decoder_orthogonal\": true, \"mse_coeff\": 1.0, \"name\": null, \"normalize_activations\": true, \"per_hook\": {}, \"pretrained_sae_paths\": null, \"retrain_saes\": true, \"sae_positions\": [\"blocks.0.hook_resid_pre\", \"blocks.1.hook_resid_pre\"], \"sae_type\": \"relu\", \"sparsity_coeff\": 0.1, \"sparsity_warmup_samples\": null}, \"save_dir\": \"output\", \"save_every_n_samples\": 0, \"seed\": 0, \"threads\": 1, \"tlens_model_name\": null, \"tlens_model_path\": \"/home/somebody/sweeps/model\", \"trackers\": [], \"wandb_project\": null, \"wandb_run_name\": null, \"wandb_tags\": [], \"warmup_samples\": 0}, \"early_stopping\": {\"collapse\": {\"constraint\": true, \"max_fvu\": 1.0, \"min_l0\": 0.5, \"patience\": 2}, \"margin\": 0.1, \"n_startup_trials\": 5, \"reduction_factor\": 3, \"type\": \"pareto\", \"warmup\": 0.2}, \"format\": 1, \"grace\": 4.0, \"heartbeat\": 1.0, \"max_losses\": 10, \"max_trials\": 12, \"name\": \"old\", \"objectives\": [{\"direction\": null, \"hook_points\": \"mean\", \"l0_tolerance\": 0.1, \"l0_weight\": 1.0, \"metric\": \"l0\", \"target_l0\": null}, {\"direction\": null, \"hook_points\": \"all\", \"l0_tolerance\": 0.1, \"l0_weight\": 1.0, \"metric\": \"fvu\", \"target_l0\": null}, {\"direction\": null, \"hook_points\": \"mean\", \"l0_tolerance\": 0.1, \"l0_weight\": 1.0, \"metric\": \"ce_recovered\", \"target_l0\": null}], \"output_dir\": null, \"pack\": 2, \"retries\": 1, \"sampler\": {\"n_startup_trials\": 8, \"seed\": 3, \"type\": \"tpe\"}, \"space\": {\"lr\": [{\"high\": 0.01, \"int\": false, \"log\": true, \"low\": 0.0001, \"step\": null, \"values\": null, \"when\": {}}], \"saes.k\": [{\"high\": null, \"int\": false, \"log\": false, \"low\": null, \"step\": null, \"values\": [2, 4, 8], \"when\": {\"saes.sae_type\": [\"topk\"]}}], \"saes.sae_type\": [{\"high\": null, \"int\": false, \"log\": false, \"low\": null, \"step\": null, \"values\": [\"relu\", \"topk\"], \"when\": {}}], \"saes.sparsity_coeff\": [{\"high\": 5.0, \"int\": false, \"log\": true, \"low\": 0.02, \"step\": null, \"values\": null, \"when\": {\"saes.sae_type\": [\"relu\"]}}]}, \"stall\": null}"');
INSERT INTO "study_system_attributes" VALUES(3,1,'saeopt:identity','"db6033a219cd48b0b9845eaf993e1ddc"');
INSERT INTO "study_system_attributes" VALUES(4,1,'dashboard:note_str:0','"# old\n- language model: `/home/somebody/sweeps/model`\n- text: `/home/somebody/sweeps/text.jsonl`, 128 samples of 16 tokens\n- hook points: `blocks.0.hook_resid_pre`, `blocks.1.hook_resid_pre`\n- sampler: tpe; objectives: minimise l0, minimise fvu, maximise ce_recovered; early stopping: pareto\n- run folders: `/home/somebody/sweeps/output/old/<trial>/`\n- a trial whose SAEs have all collapsed (L0 below 1 or FVU from 0.9 on) is shown as pruned: no front holds it\n\n| parameter | values |\n|---|---|\n| saes.sae_type | relu, topk |\n| saes.sparsity_coeff | 0.02 \u2026 5 (log) where sae_type relu |\n| saes.k | 2, 4, 8 where sae_type topk |\n| lr | 0.0001 \u2026 0.01 (log) |\n\nStatus: `saeopt study status old`; best: `saeopt study best old`"');
INSERT INTO "study_system_attributes" VALUES(5,1,'dashboard:note_ver','1');
INSERT INTO "study_system_attributes" VALUES(7,1,'dashboard:1:note_str:0','"**complete**\n\n| hook point | L0 | FVU | CE recovered | KL | dead |\n|---|--:|--:|--:|--:|--:|\n| blocks.0.hook_resid_pre | 15.8 | 0.2341 | 0.934 | 1.773 | 0.0% |\n| blocks.1.hook_resid_pre | 15.8 | 0.2015 | 0.976 | 0.596 | 0.0% |\n\n- run folder: `/home/somebody/sweeps/output/old/0`\n- config: `/home/somebody/sweeps/output/old/0/final_config.yaml`\n- saes.sae_type: \"relu\"\n- saes.sparsity_coeff: 0.8582789087418387\n- lr: 0.0005707778673609565"');
INSERT INTO "study_system_attributes" VALUES(8,1,'dashboard:1:note_ver','2');
INSERT INTO "study_system_attributes" VALUES(9,1,'dashboard:2:note_str:0','"**complete**\n\n| hook point | L0 | FVU | CE recovered | KL | dead |\n|---|--:|--:|--:|--:|--:|\n| blocks.0.hook_resid_pre | 2.0 | 0.6076 | 0.902 | 2.585 | 3.1% |\n| blocks.1.hook_resid_pre | 2.0 | 0.5723 | 0.954 | 1.588 | 0.0% |\n\n- run folder: `/home/somebody/sweeps/output/old/1`\n- config: `/home/somebody/sweeps/output/old/1/final_config.yaml`\n- saes.sae_type: \"topk\"\n- saes.k: 2\n- lr: 0.0011632365482546708"');
INSERT INTO "study_system_attributes" VALUES(10,1,'dashboard:2:note_ver','2');
INSERT INTO "study_system_attributes" VALUES(11,1,'saeopt:artifacts','"/home/somebody/sweeps/output/old/artifacts"');
INSERT INTO "study_system_attributes" VALUES(12,1,'saeopt:front_drawn','1795854881.527245');
INSERT INTO "study_system_attributes" VALUES(13,1,'dashboard:plot_data:curves:0','"{\"data\":[{\"mode\":\"lines\",\"name\":\"#0\",\"x\":[16,32,48,64,80,96,112,128],\"y\":[0.3237,0.2932,0.282,0.2714,0.2729,0.2546,0.2367,0.225],\"type\":\"scatter\"},{\"mode\":\"lines\",\"name\":\"#1\",\"x\":[16,32,48,64,80,96,112,128],\"y\":[0.7548,0.725,0.7011,0.6919,0.6898,0.6491,0.6279,0.6141],\"type\":\"scatter\"}],\"layout\":{\"template\":{},\"title\":{\"text\":\"fvu (mean over hook points) while training\"},\"xaxis\":{\"title\":{\"text\":\"samples\"}},\"yaxis\":{\"title\":{\"text\":\"fvu (mean over hook points)\"}}}}"');
INSERT INTO "study_system_attributes" VALUES(14,1,'artifacts:09f0a47e-c30a-4212-83f3-593d9672aef1','"{\"artifact_id\": \"09f0a47e-c30a-4212-83f3-593d9672aef1\", \"filename\": \"pareto_front.png\", \"mimetype\": \"image/png\", \"encoding\": null}"');
INSERT INTO "study_system_attributes" VALUES(15,1,'dashboard:plot_data:front:0','"{\"data\":[{\"marker\":{\"color\":\"#0072B2\",\"symbol\":\"circle\"},\"mode\":\"markers\",\"name\":\"relu \\u00b7 blocks.0.hook_resid_pre\",\"text\":[\"#0\"],\"x\":[15.761],\"y\":[0.76585],\"type\":\"scatter\"},{\"marker\":{\"color\":\"#0072B2\",\"symbol\":\"square\"},\"mode\":\"markers\",\"name\":\"relu \\u00b7 blocks.1.hook_resid_pre\",\"text\":[\"#0\"],\"x\":[15.829],\"y\":[0.79851],\"type\":\"scatter\"},{\"marker\":{\"color\":\"#D55E00\",\"symbol\":\"circle\"},\"mode\":\"markers\",\"name\":\"topk \\u00b7 blocks.0.hook_resid_pre\",\"text\":[\"#1\"],\"x\":[2.0],\"y\":[0.39237999999999995],\"type\":\"scatter\"},{\"marker\":{\"color\":\"#D55E00\",\"symbol\":\"square\"},\"mode\":\"markers\",\"name\":\"topk \\u00b7 blocks.1.hook_resid_pre\",\"text\":[\"#1\"],\"x\":[2.0],\"y\":[0.42772],\"type\":\"scatter\"},{\"line\":{\"color\":\"#666666\",\"shape\":\"hv\",\"width\":1},\"mode\":\"lines\",\"name\":\"front \\u00b7 blocks.0.hook_resid_pre\",\"x\":[2.0,15.761],\"y\":[0.39237999999999995,0.76585],\"type\":\"scatter\"},{\"line\":{\"color\":\"#666666\",\"shape\":\"hv\",\"width\":1},\"mode\":\"lines\",\"name\":\"front \\u00b7 blocks.1.hook_resid_pre\",\"x\":[2.0,15.829],\"y\":[0.42772,0.79851],\"type\":\"scatter\"}],\"layout\":{\"template\":{},\"xaxis\":{\"type\":\"log\",\"title\":{\"text\":\"L0\"}},\"title\":{\"text\":\"Sparsity against fidelity\"},\"yaxis\":{\"title\":{\"text\":\"explained variance\"}}}}"');
INSERT INTO "study_system_attributes" VALUES(16,1,'dashboard:3:note_str:0','"**complete**\n\n| hook point | L0 | FVU | CE recovered | KL | dead |\n|---|--:|--:|--:|--:|--:|\n| blocks.0.hook_resid_pre | 8.0 | 0.3385 | 0.951 | 2.082 | 0.0% |\n| blocks.1.hook_resid_pre | 8.0 | 0.3127 | 0.958 | 0.912 | 0.0% |\n\n- run folder: `/home/somebody/sweeps/output/old/2`\n- config: `/home/somebody/sweeps/output/old/2/final_config.yaml`\n- saes.sae_type: \"topk\"\n- saes.k: 8\n- lr: 0.0002880259134136547"');
INSERT INTO "study_system_attributes" VALUES(17,1,'dashboard:3:note_ver','2');
INSERT INTO "study_system_attributes" VALUES(18,1,'dashboard:4:note_str:0','"**complete**\n\n| hook point | L0 | FVU | CE recovered | KL | dead |\n|---|--:|--:|--:|--:|--:|\n| blocks.0.hook_resid_pre | 16.1 | 0.0756 | 1.035 | 0.937 | 0.0% |\n| blocks.1.hook_resid_pre | 15.4 | 0.0869 | 1.027 | 0.383 | 0.0% |\n\n- run folder: `/home/somebody/sweeps/output/old/3`\n- config: `/home/somebody/sweeps/output/old/3/final_config.yaml`\n- saes.sae_type: \"relu\"\n- saes.sparsity_coeff: 0.2595232056748677\n- lr: 0.004409239110980289"');
INSERT INTO "study_system_attributes" VALUES(19,1,'dashboard:4:note_ver','2');
INSERT INTO "study_system_attributes" VALUES(20,1,'dashboard:5:note_str:0','"**training on host-a/7/cpu**\n\n\n- run folder: `/home/somebody/sweeps/output/old/4`\n- config: `/home/somebody/sweeps/output/old/4/final_config.yaml`\n- saes.sae_type: \"relu\"\n- saes.sparsity_coeff: 0.04119612478970035\n- lr: 0.0068285503706118226"');
INSERT INTO "study_system_attributes" VALUES(21,1,'dashboard:5:note_ver','1');
INSERT INTO "study_system_attributes" VALUES(22,1,'dashboard:12:note_str:0','"**training on host-a/7/cpu**\n\n\n- run folder: `/home/somebody/sweeps/output/old/11`\n- config: `/home/somebody/sweeps/output/old/11/final_config.yaml`"');
INSERT INTO "study_system_attributes" VALUES(23,1,'dashboard:12:note_ver','1');
INSERT INTO "study_system_attributes" VALUES(24,1,'saeopt:worker:host-a/7/cpu','{"worker": "host-a/7/cpu", "host": "host-a", "device": "cpu", "pid": 7, "started": 0.0, "seen": 1795854887.816557, "trials": [11], "samples": 0, "total": 0, "tokens_per_s": 0.0, "finished": 0, "latest": {}, "pack": 0, "left": null, "whole": null, "quiet": null, "age": 0.0}');
INSERT INTO "study_system_attributes" VALUES(25,2,'study:metric_names','["fvu"]');
INSERT INTO "study_system_attributes" VALUES(26,2,'saeopt:spec','"{\"base\": {\"activations\": {\"cache\": \"auto\", \"cache_max_gb\": 50.0, \"dtype\": \"auto\"}, \"adam_betas\": [0.9, 0.99], \"as_typed\": {\"/home/somebody/sweeps/model\": \"model\", \"/home/somebody/sweeps/output\": \"output\", \"/home/somebody/sweeps/text.jsonl\": \"text.jsonl\"}, \"ce_ablation\": \"unmasked\", \"cooldown_samples\": null, \"data\": {\"column_name\": \"text\", \"context_length\": 16, \"dataset_name\": \"/home/somebody/sweeps/text.jsonl\", \"eval_batch_size\": 20, \"eval_column_name\": null, \"eval_dataset_name\": null, \"eval_split\": null, \"is_tokenized\": false, \"join_documents\": true, \"mask_norm_outliers\": null, \"mask_special_tokens\": true, \"n_eval_samples\": 16, \"n_train_samples\": 128, \"prepend_bos\": false, \"seed\": null, \"separator\": \"auto\", \"shuffle_buffer_tokens\": 0, \"shuffle_documents\": true, \"skip_first_positions\": 0, \"split\": \"train\", \"streaming\": false, \"subset\": null, \"text_unit\": \"auto\", \"token_dtype\": null, \"tokenizer_name\": null, \"train_batch_size\": 4}, \"eval_every_n_samples\": 0, \"gradient_accumulation_steps\": 1, \"keep_checkpoints\": null, \"legacy_scaling\": null, \"lm_batch_size\": null, \"lm_dtype\": \"auto\", \"lm_processing\": \"raw\", \"log_every_n_grad_steps\": 4, \"lr\": 0.001, \"lr_schedule\": \"constant\", \"max_grad_norm\": 1.0, \"min_lr_factor\": 0.0, \"mixed_precision\": \"auto\", \"performance\": {\"compile\": \"auto\", \"graphs\": \"auto\", \"stack\": \"auto\"}, \"recipe\": 2, \"saes\": {\"bias_init\": \"geometric_median\", \"dead_after_tokens\": null, \"decoder_norm\": null, \"dict_size_to_input_ratio\": 2.0, \"init_decoder_orthogonal\": true, \"mse_coeff\": 1.0, \"name\": null, \"normalize_activations\": true, \"per_hook\": {}, \"pretrained_sae_paths\": null, \"retrain_saes\": true, \"sae_positions\": [\"blocks.0.hook_resid_pre\", \"blocks.1.hook_resid_pre\"], \"sae_type\": \"relu\", \"sparsity_coeff\": 0.1, \"sparsity_warmup_samples\": null}, \"save_dir\": \"output\", \"save_every_n_samples\": 0, \"seed\": 0, \"threads\": 1, \"tlens_model_name\": null, \"tlens_model_path\": \"/home/somebody/sweeps/model\", \"trackers\": [], \"wandb_project\": null, \"wandb_run_name\": null, \"wandb_tags\": [], \"warmup_samples\": 0}, \"early_stopping\": {\"collapse\": {\"constraint\": true, \"max_fvu\": 1.0, \"min_l0\": 0.5, \"patience\": 2}, \"margin\": 0.1, \"n_startup_trials\": 5, \"reduction_factor\": 3, \"type\": \"none\", \"warmup\": 0.2}, \"format\": 1, \"grace\": 4.0, \"heartbeat\": 1.0, \"max_losses\": 10, \"max_trials\": null, \"name\": \"cells\", \"objectives\": [{\"direction\": null, \"hook_points\": \"mean\", \"l0_tolerance\": 0.1, \"l0_weight\": 1.0, \"metric\": \"fvu\", \"target_l0\": null}], \"output_dir\": null, \"pack\": 2, \"retries\": 2, \"sampler\": {\"n_startup_trials\": 10, \"seed\": 0, \"type\": \"grid\"}, \"space\": {\"lr\": [{\"high\": null, \"int\": false, \"log\": false, \"low\": null, \"step\": null, \"values\": [0.001, 0.002], \"when\": {}}]}, \"stall\": null}"');
INSERT INTO "study_system_attributes" VALUES(27,2,'saeopt:identity','"1843fa7814244b71b30baa5141b62b58"');
INSERT INTO "study_system_attributes" VALUES(28,2,'saeopt:stopped','true');
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_user_attributes" VALUES(1,1,'intermediate_values','"fvu (mean over hook points)"');
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_heartbeats" VALUES(1,1,'2026-11-28 08:34:40.268489');
INSERT INTO "trial_heartbeats" VALUES(2,2,'2026-11-28 08:34:41.506977');
INSERT INTO "trial_heartbeats" VALUES(3,3,'2026-11-28 08:34:45.040706');
INSERT INTO "trial_heartbeats" VALUES(4,4,'2026-11-28 08:34:46.168477');
INSERT INTO "trial_heartbeats" VALUES(5,5,'2026-11-28 08:34:47.728402');
INSERT INTO "trial_heartbeats" VALUES(6,6,'2026-11-28 08:34:47.752616');
INSERT INTO "trial_heartbeats" VALUES(7,7,'2026-11-28 08:34:47.761678');
INSERT INTO "trial_heartbeats" VALUES(8,8,'2026-11-28 08:34:47.793156');
INSERT INTO "trial_heartbeats" VALUES(9,9,'2026-11-28 08:34:47.781360');
INSERT INTO "trial_heartbeats" VALUES(10,10,'2026-11-28 08:34:47.787636');
INSERT INTO "trial_heartbeats" VALUES(11,11,'2026-11-28 08:34:47.787636');
INSERT INTO "trial_heartbeats" VALUES(12,12,'2026-11-28 08:34:47.808913');
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_intermediate_values" VALUES(1,1,16,3.23676410624165300511e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(2,2,16,7.54780509381054676154e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(3,1,32,2.93173365058450152709e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(4,2,32,7.24959331822779828868e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(5,1,48,2.82033261556970948902e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(6,2,48,0.701103194128558,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(7,1,64,2.71439145681096394291e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(8,2,64,6.91854645440193483096e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(9,1,80,2.72925419679363401304e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(10,2,80,6.89778866443996219182e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(11,1,96,2.54630721633508472212e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(12,2,96,6.49119309725395332577e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(13,1,112,2.36665931860967265754e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(14,2,112,6.27934646365516102584e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(15,1,128,2.24996075903770076376e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(16,2,128,6.14066870515328711022e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(17,3,16,3.94009232474117565558e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(18,4,16,2.78843370216088293211e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(19,3,32,3.75939810386532680119e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(20,4,32,1.81682642561864671204e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(21,3,48,3.65680829857215949907e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(22,4,48,1.51374636674575124839e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(23,3,64,3.64437227962536636205e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(24,4,64,1.3619541926574282864e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(25,3,80,3.74701883071033303718e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(26,4,80,1.21895765313205506341e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(27,3,96,3.57487949861142906282e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(28,4,96,1.09270860023038762776e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(29,3,112,3.37359607433991737224e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(30,4,112,9.76383726701584575558e-02,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(31,3,128,3.36836289695579660374e-01,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(32,4,128,9.03872527376061579706e-02,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(33,5,16,20.0,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(34,5,32,20.0,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(35,5,48,20.0,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(36,12,16,5.0,'FINITE');
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_params" VALUES(1,1,'saes.sae_type',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["relu", "topk"]}}');
INSERT INTO "trial_params" VALUES(2,1,'saes.sparsity_coeff',8.58278908741838653106e-01,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.02, "high": 5.0, "log": true}}');
INSERT INTO "trial_params" VALUES(3,1,'lr',5.70777867360956455214e-04,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0001, "high": 0.01, "log": true}}');
INSERT INTO "trial_params" VALUES(4,2,'saes.sae_type',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["relu", "topk"]}}');
INSERT INTO "trial_params" VALUES(5,2,'saes.k',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [2, 4, 8]}}');
INSERT INTO "trial_params" VALUES(6,2,'lr',1.16323654825467082997e-03,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0001, "high": 0.01, "log": true}}');
INSERT INTO "trial_params" VALUES(7,3,'saes.sae_type',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["relu", "topk"]}}');
INSERT INTO "trial_params" VALUES(8,3,'saes.k',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [2, 4, 8]}}');
INSERT INTO "trial_params" VALUES(9,3,'lr',2.88025913413654684452e-04,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0001, "high": 0.01, "log": true}}');
INSERT INTO "trial_params" VALUES(10,4,'saes.sae_type',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["relu", "topk"]}}');
INSERT INTO "trial_params" VALUES(11,4,'saes.sparsity_coeff',2.59523205674867696313e-01,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.02, "high": 5.0, "log": true}}');
INSERT INTO "trial_params" VALUES(12,4,'lr',4.40923911098028888794e-03,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0001, "high": 0.01, "log": true}}');
INSERT INTO "trial_params" VALUES(13,5,'saes.sae_type',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["relu", "topk"]}}');
INSERT INTO "trial_params" VALUES(14,5,'saes.sparsity_coeff',4.11961247897003474127e-02,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.02, "high": 5.0, "log": true}}');
INSERT INTO "trial_params" VALUES(15,5,'lr',6.82855037061182255225e-03,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0001, "high": 0.01, "log": true}}');
INSERT INTO "trial_params" VALUES(16,6,'saes.sae_type',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["relu", "topk"]}}');
INSERT INTO "trial_params" VALUES(17,6,'saes.k',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [2, 4, 8]}}');
INSERT INTO "trial_params" VALUES(18,6,'lr',1.04595408806811384478e-04,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0001, "high": 0.01, "log": true}}');
INSERT INTO "trial_params" VALUES(19,7,'saes.sae_type',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["relu", "topk"]}}');
INSERT INTO "trial_params" VALUES(20,7,'saes.k',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [2, 4, 8]}}');
INSERT INTO "trial_params" VALUES(21,7,'lr',2.40731063513640068315e-03,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0001, "high": 0.01, "log": true}}');
INSERT INTO "trial_params" VALUES(22,8,'saes.sae_type',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["relu", "topk"]}}');
INSERT INTO "trial_params" VALUES(23,8,'saes.sparsity_coeff',4.31007382583572873357e+00,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.02, "high": 5.0, "log": true}}');
INSERT INTO "trial_params" VALUES(24,8,'lr',4.90338853053008325022e-04,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0001, "high": 0.01, "log": true}}');
INSERT INTO "trial_params" VALUES(25,13,'lr',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [0.001, 0.002]}}');
INSERT INTO "trial_params" VALUES(26,14,'lr',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [0.001, 0.002]}}');
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_system_attributes" VALUES(1,1,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(2,2,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(3,3,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(4,4,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(5,5,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(6,6,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(7,7,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(8,8,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(9,9,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(10,10,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(11,11,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(12,12,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(15,1,'saeopt:turn','1');
INSERT INTO "trial_system_attributes" VALUES(16,2,'saeopt:turn','1');
INSERT INTO "trial_system_attributes" VALUES(17,1,'saeopt:checkpoint','128');
INSERT INTO "trial_system_attributes" VALUES(18,2,'saeopt:checkpoint','128');
INSERT INTO "trial_system_attributes" VALUES(19,1,'artifacts:cd7db376-c740-4c1b-a8eb-baefecc5c07e','"{\"artifact_id\": \"cd7db376-c740-4c1b-a8eb-baefecc5c07e\", \"filename\": \"training_curves.png\", \"mimetype\": \"image/png\", \"encoding\": null}"');
INSERT INTO "trial_system_attributes" VALUES(20,1,'constraints','[-2.757535753610819, -0.6658527463541472]');
INSERT INTO "trial_system_attributes" VALUES(21,2,'artifacts:1d4d143b-ab3a-418b-bd73-cdabcc1c1024','"{\"artifact_id\": \"1d4d143b-ab3a-418b-bd73-cdabcc1c1024\", \"filename\": \"training_curves.png\", \"mimetype\": \"image/png\", \"encoding\": null}"');
INSERT INTO "trial_system_attributes" VALUES(22,2,'constraints','[-0.6931471805599453, -0.29238145130086346]');
INSERT INTO "trial_system_attributes" VALUES(25,3,'saeopt:turn','1');
INSERT INTO "trial_system_attributes" VALUES(26,4,'saeopt:turn','1');
INSERT INTO "trial_system_attributes" VALUES(27,3,'saeopt:checkpoint','128');
INSERT INTO "trial_system_attributes" VALUES(28,4,'saeopt:checkpoint','128');
INSERT INTO "trial_system_attributes" VALUES(29,3,'artifacts:fbfa99cd-b7ea-4046-8fb4-731126f64f8f','"{\"artifact_id\": \"fbfa99cd-b7ea-4046-8fb4-731126f64f8f\", \"filename\": \"training_curves.png\", \"mimetype\": \"image/png\", \"encoding\": null}"');
INSERT INTO "trial_system_attributes" VALUES(30,3,'constraints','[-2.0794415416798357, -0.5614715171111185]');
INSERT INTO "trial_system_attributes" VALUES(31,4,'artifacts:815f2b4d-9adb-4c28-968c-e1993955c6e4','"{\"artifact_id\": \"815f2b4d-9adb-4c28-968c-e1993955c6e4\", \"filename\": \"training_curves.png\", \"mimetype\": \"image/png\", \"encoding\": null}"');
INSERT INTO "trial_system_attributes" VALUES(32,4,'constraints','[-2.778547031823412, -0.8244263751358246]');
INSERT INTO "trial_system_attributes" VALUES(34,5,'saeopt:turn','1');
INSERT INTO "trial_system_attributes" VALUES(35,5,'saeopt:curve','{"48": [20.0, 0.9, 0.95, 0.1]}');
INSERT INTO "trial_system_attributes" VALUES(36,5,'constraints','[0.001]');
INSERT INTO "trial_system_attributes" VALUES(38,6,'saeopt:turn','1');
INSERT INTO "trial_system_attributes" VALUES(39,6,'constraints','[1.6094379124341003, 0.08999999999999997, 1.0]');
INSERT INTO "trial_system_attributes" VALUES(41,7,'saeopt:turn','1');
INSERT INTO "trial_system_attributes" VALUES(42,7,'constraints','[-1.791759469228055, -0.6000000000000001]');
INSERT INTO "trial_system_attributes" VALUES(44,8,'saeopt:turn','2');
INSERT INTO "trial_system_attributes" VALUES(45,8,'saeopt:failures','2');
INSERT INTO "trial_system_attributes" VALUES(48,9,'saeopt:turn','1');
INSERT INTO "trial_system_attributes" VALUES(51,12,'saeopt:claim','{"token": "9b2a7da4a4544ad4b911d96ad8d7e4d6", "worker": "host-a/7/cpu", "host": "host-a", "device": "cpu", "pid": 7}');
INSERT INTO "trial_system_attributes" VALUES(52,10,'saeopt:turn','1');
INSERT INTO "trial_system_attributes" VALUES(53,11,'saeopt:turn','1');
INSERT INTO "trial_system_attributes" VALUES(54,12,'saeopt:turn','1');
INSERT INTO "trial_system_attributes" VALUES(55,9,'saeopt:checkpoint','64');
INSERT INTO "trial_system_attributes" VALUES(56,10,'saeopt:behind','true');
INSERT INTO "trial_system_attributes" VALUES(57,13,'saeopt:stream','"34753e00b133614e"');
INSERT INTO "trial_system_attributes" VALUES(58,14,'saeopt:stream','"34753e00b133614e"');
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_user_attributes" VALUES(1,1,'run_dir','"/home/somebody/sweeps/output/old/0"');
INSERT INTO "trial_user_attributes" VALUES(2,2,'run_dir','"/home/somebody/sweeps/output/old/1"');
INSERT INTO "trial_user_attributes" VALUES(3,1,'eval/blocks.0.hook_resid_pre','{"l0": 15.761, "explained_variance": 0.76585, "fvu": 0.23415, "ce_recovered": 0.9345, "kl": 1.7731, "fraction_dead": 0.0, "mse": 0.92632, "cosine": 0.88455, "n_tokens": 251, "ce_clean": 6.4422, "ce_degradation": -0.13354, "ce_sae": 6.3087, "ce_zero": 4.4035, "fraction_alive": 1.0, "l1": 4.9891, "n_predictions": 235, "norm_ratio": 0.88121}');
INSERT INTO "trial_user_attributes" VALUES(4,1,'eval/blocks.1.hook_resid_pre','{"l0": 15.829, "explained_variance": 0.79851, "fvu": 0.20149, "ce_recovered": 0.97603, "kl": 0.596, "fraction_dead": 0.0, "mse": 180.38, "cosine": 0.91473, "n_tokens": 251, "ce_clean": 6.4422, "ce_degradation": -0.049084, "ce_sae": 6.3931, "ce_zero": 4.3943, "fraction_alive": 1.0, "l1": 70.174, "n_predictions": 235, "norm_ratio": 0.89982}');
INSERT INTO "trial_user_attributes" VALUES(5,1,'l0','15.795');
INSERT INTO "trial_user_attributes" VALUES(6,1,'explained_variance','0.78218');
INSERT INTO "trial_user_attributes" VALUES(7,1,'fvu','0.21782');
INSERT INTO "trial_user_attributes" VALUES(8,1,'ce_recovered','0.95526');
INSERT INTO "trial_user_attributes" VALUES(9,1,'kl','1.1845');
INSERT INTO "trial_user_attributes" VALUES(10,1,'fraction_dead','0.0');
INSERT INTO "trial_user_attributes" VALUES(11,1,'mse','90.653');
INSERT INTO "trial_user_attributes" VALUES(12,1,'cosine','0.89964');
INSERT INTO "trial_user_attributes" VALUES(13,1,'l0@blocks.0.hook_resid_pre','15.761');
INSERT INTO "trial_user_attributes" VALUES(14,1,'l0@blocks.1.hook_resid_pre','15.829');
INSERT INTO "trial_user_attributes" VALUES(15,1,'fvu@blocks.0.hook_resid_pre','0.23415');
INSERT INTO "trial_user_attributes" VALUES(16,1,'fvu@blocks.1.hook_resid_pre','0.20149');
INSERT INTO "trial_user_attributes" VALUES(17,1,'ce_recovered@blocks.0.hook_resid_pre','0.9345');
INSERT INTO "trial_user_attributes" VALUES(18,1,'ce_recovered@blocks.1.hook_resid_pre','0.97603');
INSERT INTO "trial_user_attributes" VALUES(19,1,'fraction_dead@blocks.0.hook_resid_pre','0.0');
INSERT INTO "trial_user_attributes" VALUES(20,1,'fraction_dead@blocks.1.hook_resid_pre','0.0');
INSERT INTO "trial_user_attributes" VALUES(21,1,'samples','128');
INSERT INTO "trial_user_attributes" VALUES(22,2,'eval/blocks.0.hook_resid_pre','{"l0": 2.0, "explained_variance": 0.39238, "fvu": 0.60762, "ce_recovered": 0.90188, "kl": 2.5851, "fraction_dead": 0.03125, "mse": 2.4038, "cosine": 0.68402, "n_tokens": 251, "ce_clean": 6.4422, "ce_degradation": -0.20003, "ce_sae": 6.2422, "ce_zero": 4.4035, "fraction_alive": 0.96875, "l1": 2.3687, "n_predictions": 235, "norm_ratio": 0.88458}');
INSERT INTO "trial_user_attributes" VALUES(23,2,'eval/blocks.1.hook_resid_pre','{"l0": 2.0, "explained_variance": 0.42772, "fvu": 0.57228, "ce_recovered": 0.95431, "kl": 1.5883, "fraction_dead": 0.0, "mse": 512.32, "cosine": 0.716, "n_tokens": 251, "ce_clean": 6.4422, "ce_degradation": -0.093564, "ce_sae": 6.3486, "ce_zero": 4.3943, "fraction_alive": 1.0, "l1": 33.58, "n_predictions": 235, "norm_ratio": 0.91895}');
INSERT INTO "trial_user_attributes" VALUES(24,2,'l0','2.0');
INSERT INTO "trial_user_attributes" VALUES(25,2,'explained_variance','0.41005');
INSERT INTO "trial_user_attributes" VALUES(26,2,'fvu','0.58995');
INSERT INTO "trial_user_attributes" VALUES(27,2,'ce_recovered','0.9281');
INSERT INTO "trial_user_attributes" VALUES(28,2,'kl','2.0867');
INSERT INTO "trial_user_attributes" VALUES(29,2,'fraction_dead','0.015625');
INSERT INTO "trial_user_attributes" VALUES(30,2,'mse','257.36');
INSERT INTO "trial_user_attributes" VALUES(31,2,'cosine','0.70001');
INSERT INTO "trial_user_attributes" VALUES(32,2,'l0@blocks.0.hook_resid_pre','2.0');
INSERT INTO "trial_user_attributes" VALUES(33,2,'l0@blocks.1.hook_resid_pre','2.0');
INSERT INTO "trial_user_attributes" VALUES(34,2,'fvu@blocks.0.hook_resid_pre','0.60762');
INSERT INTO "trial_user_attributes" VALUES(35,2,'fvu@blocks.1.hook_resid_pre','0.57228');
INSERT INTO "trial_user_attributes" VALUES(36,2,'ce_recovered@blocks.0.hook_resid_pre','0.90188');
INSERT INTO "trial_user_attributes" VALUES(37,2,'ce_recovered@blocks.1.hook_resid_pre','0.95431');
INSERT INTO "trial_user_attributes" VALUES(38,2,'fraction_dead@blocks.0.hook_resid_pre','0.03125');
INSERT INTO "trial_user_attributes" VALUES(39,2,'fraction_dead@blocks.1.hook_resid_pre','0.0');
INSERT INTO "trial_user_attributes" VALUES(40,2,'samples','128');
INSERT INTO "trial_user_attributes" VALUES(41,3,'run_dir','"/home/somebody/sweeps/output/old/2"');
INSERT INTO "trial_user_attributes" VALUES(42,4,'run_dir','"/home/somebody/sweeps/output/old/3"');
INSERT INTO "trial_user_attributes" VALUES(43,3,'eval/blocks.0.hook_resid_pre','{"l0": 8.0, "explained_variance": 0.66147, "fvu": 0.33853, "ce_recovered": 0.95111, "kl": 2.0821, "fraction_dead": 0.0, "mse": 1.3393, "cosine": 0.83774, "n_tokens": 251, "ce_clean": 6.4422, "ce_degradation": -0.099667, "ce_sae": 6.3425, "ce_zero": 4.4035, "fraction_alive": 1.0, "l1": 4.4603, "n_predictions": 235, "norm_ratio": 0.96126}');
INSERT INTO "trial_user_attributes" VALUES(44,3,'eval/blocks.1.hook_resid_pre','{"l0": 8.0, "explained_variance": 0.68734, "fvu": 0.31266, "ce_recovered": 0.95767, "kl": 0.91209, "fraction_dead": 0.0, "mse": 279.9, "cosine": 0.86649, "n_tokens": 251, "ce_clean": 6.4422, "ce_degradation": -0.086685, "ce_sae": 6.3555, "ce_zero": 4.3943, "fraction_alive": 1.0, "l1": 62.854, "n_predictions": 235, "norm_ratio": 0.97703}');
INSERT INTO "trial_user_attributes" VALUES(45,3,'l0','8.0');
INSERT INTO "trial_user_attributes" VALUES(46,3,'explained_variance','0.67441');
INSERT INTO "trial_user_attributes" VALUES(47,3,'fvu','0.32559');
INSERT INTO "trial_user_attributes" VALUES(48,3,'ce_recovered','0.95439');
INSERT INTO "trial_user_attributes" VALUES(49,3,'kl','1.4971');
INSERT INTO "trial_user_attributes" VALUES(50,3,'fraction_dead','0.0');
INSERT INTO "trial_user_attributes" VALUES(51,3,'mse','140.62');
INSERT INTO "trial_user_attributes" VALUES(52,3,'cosine','0.85212');
INSERT INTO "trial_user_attributes" VALUES(53,3,'l0@blocks.0.hook_resid_pre','8.0');
INSERT INTO "trial_user_attributes" VALUES(54,3,'l0@blocks.1.hook_resid_pre','8.0');
INSERT INTO "trial_user_attributes" VALUES(55,3,'fvu@blocks.0.hook_resid_pre','0.33853');
INSERT INTO "trial_user_attributes" VALUES(56,3,'fvu@blocks.1.hook_resid_pre','0.31266');
INSERT INTO "trial_user_attributes" VALUES(57,3,'ce_recovered@blocks.0.hook_resid_pre','0.95111');
INSERT INTO "trial_user_attributes" VALUES(58,3,'ce_recovered@blocks.1.hook_resid_pre','0.95767');
INSERT INTO "trial_user_attributes" VALUES(59,3,'fraction_dead@blocks.0.hook_resid_pre','0.0');
INSERT INTO "trial_user_attributes" VALUES(60,3,'fraction_dead@blocks.1.hook_resid_pre','0.0');
INSERT INTO "trial_user_attributes" VALUES(61,3,'samples','128');
INSERT INTO "trial_user_attributes" VALUES(62,4,'eval/blocks.0.hook_resid_pre','{"l0": 16.096, "explained_variance": 0.92443, "fvu": 0.075574, "ce_recovered": 1.0353, "kl": 0.93725, "fraction_dead": 0.0, "mse": 0.29898, "cosine": 0.96556, "n_tokens": 251, "ce_clean": 6.4422, "ce_degradation": 0.071873, "ce_sae": 6.5141, "ce_zero": 4.4035, "fraction_alive": 1.0, "l1": 5.2917, "n_predictions": 235, "norm_ratio": 0.87565}');
INSERT INTO "trial_user_attributes" VALUES(63,4,'eval/blocks.1.hook_resid_pre','{"l0": 15.371, "explained_variance": 0.91313, "fvu": 0.086867, "ce_recovered": 1.0272, "kl": 0.38278, "fraction_dead": 0.0, "mse": 77.766, "cosine": 0.95585, "n_tokens": 251, "ce_clean": 6.4422, "ce_degradation": 0.055742, "ce_sae": 6.4979, "ce_zero": 4.3943, "fraction_alive": 1.0, "l1": 67.093, "n_predictions": 235, "norm_ratio": 0.88964}');
INSERT INTO "trial_user_attributes" VALUES(64,4,'l0','15.733');
INSERT INTO "trial_user_attributes" VALUES(65,4,'explained_variance','0.91878');
INSERT INTO "trial_user_attributes" VALUES(66,4,'fvu','0.08122');
INSERT INTO "trial_user_attributes" VALUES(67,4,'ce_recovered','1.0312');
INSERT INTO "trial_user_attributes" VALUES(68,4,'kl','0.66002');
INSERT INTO "trial_user_attributes" VALUES(69,4,'fraction_dead','0.0');
INSERT INTO "trial_user_attributes" VALUES(70,4,'mse','39.032');
INSERT INTO "trial_user_attributes" VALUES(71,4,'cosine','0.96071');
INSERT INTO "trial_user_attributes" VALUES(72,4,'l0@blocks.0.hook_resid_pre','16.096');
INSERT INTO "trial_user_attributes" VALUES(73,4,'l0@blocks.1.hook_resid_pre','15.371');
INSERT INTO "trial_user_attributes" VALUES(74,4,'fvu@blocks.0.hook_resid_pre','0.075574');
INSERT INTO "trial_user_attributes" VALUES(75,4,'fvu@blocks.1.hook_resid_pre','0.086867');
INSERT INTO "trial_user_attributes" VALUES(76,4,'ce_recovered@blocks.0.hook_resid_pre','1.0353');
INSERT INTO "trial_user_attributes" VALUES(77,4,'ce_recovered@blocks.1.hook_resid_pre','1.0272');
INSERT INTO "trial_user_attributes" VALUES(78,4,'fraction_dead@blocks.0.hook_resid_pre','0.0');
INSERT INTO "trial_user_attributes" VALUES(79,4,'fraction_dead@blocks.1.hook_resid_pre','0.0');
INSERT INTO "trial_user_attributes" VALUES(80,4,'samples','128');
INSERT INTO "trial_user_attributes" VALUES(81,5,'run_dir','"/home/somebody/sweeps/output/old/4"');
INSERT INTO "trial_user_attributes" VALUES(82,5,'reason','"stopped early: at 48 samples trial 1 was better in every objective"');
INSERT INTO "trial_user_attributes" VALUES(83,6,'reason','"collapsed: blocks.0.hook_resid_pre: L0 0.2 is below 1; blocks.1.hook_resid_pre: L0 0.2 is below 1"');
INSERT INTO "trial_user_attributes" VALUES(84,6,'eval/blocks.0.hook_resid_pre','{"l0": 0.2, "explained_variance": 0.01, "fvu": 0.99, "ce_recovered": 0.8, "kl": 0.1, "fraction_dead": 0.25, "mse": 1.5, "cosine": 0.8, "n_tokens": 240, "ce_clean": 3.0, "ce_sae": 3.2, "ce_zero": 4.0, "fraction_alive": 0.75, "l1": 2.0, "norm_ratio": 0.9}');
INSERT INTO "trial_user_attributes" VALUES(85,6,'eval/blocks.1.hook_resid_pre','{"l0": 0.2, "explained_variance": 0.01, "fvu": 0.99, "ce_recovered": 0.8, "kl": 0.1, "fraction_dead": 0.25, "mse": 1.5, "cosine": 0.8, "n_tokens": 240, "ce_clean": 3.0, "ce_sae": 3.2, "ce_zero": 4.0, "fraction_alive": 0.75, "l1": 2.0, "norm_ratio": 0.9}');
INSERT INTO "trial_user_attributes" VALUES(86,6,'l0','0.2');
INSERT INTO "trial_user_attributes" VALUES(87,6,'explained_variance','0.01');
INSERT INTO "trial_user_attributes" VALUES(88,6,'fvu','0.99');
INSERT INTO "trial_user_attributes" VALUES(89,6,'ce_recovered','0.8');
INSERT INTO "trial_user_attributes" VALUES(90,6,'kl','0.1');
INSERT INTO "trial_user_attributes" VALUES(91,6,'fraction_dead','0.25');
INSERT INTO "trial_user_attributes" VALUES(92,6,'mse','1.5');
INSERT INTO "trial_user_attributes" VALUES(93,6,'cosine','0.8');
INSERT INTO "trial_user_attributes" VALUES(94,6,'l0@blocks.0.hook_resid_pre','0.2');
INSERT INTO "trial_user_attributes" VALUES(95,6,'l0@blocks.1.hook_resid_pre','0.2');
INSERT INTO "trial_user_attributes" VALUES(96,6,'fvu@blocks.0.hook_resid_pre','0.99');
INSERT INTO "trial_user_attributes" VALUES(97,6,'fvu@blocks.1.hook_resid_pre','0.99');
INSERT INTO "trial_user_attributes" VALUES(98,6,'ce_recovered@blocks.0.hook_resid_pre','0.8');
INSERT INTO "trial_user_attributes" VALUES(99,6,'ce_recovered@blocks.1.hook_resid_pre','0.8');
INSERT INTO "trial_user_attributes" VALUES(100,6,'fraction_dead@blocks.0.hook_resid_pre','0.25');
INSERT INTO "trial_user_attributes" VALUES(101,6,'fraction_dead@blocks.1.hook_resid_pre','0.25');
INSERT INTO "trial_user_attributes" VALUES(102,7,'eval/blocks.0.hook_resid_pre','{"l0": 0.7, "explained_variance": 0.5, "fvu": 0.5, "ce_recovered": 0.8, "kl": 0.1, "fraction_dead": 0.25, "mse": 1.5, "cosine": 0.8, "n_tokens": 240, "ce_clean": 3.0, "ce_sae": 3.2, "ce_zero": 4.0, "fraction_alive": 0.75, "l1": 2.0, "norm_ratio": 0.9}');
INSERT INTO "trial_user_attributes" VALUES(103,7,'eval/blocks.1.hook_resid_pre','{"l0": 6.0, "explained_variance": 0.7, "fvu": 0.3, "ce_recovered": 0.8, "kl": 0.1, "fraction_dead": 0.25, "mse": 1.5, "cosine": 0.8, "n_tokens": 240, "ce_clean": 3.0, "ce_sae": 3.2, "ce_zero": 4.0, "fraction_alive": 0.75, "l1": 2.0, "norm_ratio": 0.9}');
INSERT INTO "trial_user_attributes" VALUES(104,7,'l0','3.35');
INSERT INTO "trial_user_attributes" VALUES(105,7,'explained_variance','0.6');
INSERT INTO "trial_user_attributes" VALUES(106,7,'fvu','0.4');
INSERT INTO "trial_user_attributes" VALUES(107,7,'ce_recovered','0.8');
INSERT INTO "trial_user_attributes" VALUES(108,7,'kl','0.1');
INSERT INTO "trial_user_attributes" VALUES(109,7,'fraction_dead','0.25');
INSERT INTO "trial_user_attributes" VALUES(110,7,'mse','1.5');
INSERT INTO "trial_user_attributes" VALUES(111,7,'cosine','0.8');
INSERT INTO "trial_user_attributes" VALUES(112,7,'l0@blocks.0.hook_resid_pre','0.7');
INSERT INTO "trial_user_attributes" VALUES(113,7,'l0@blocks.1.hook_resid_pre','6.0');
INSERT INTO "trial_user_attributes" VALUES(114,7,'fvu@blocks.0.hook_resid_pre','0.5');
INSERT INTO "trial_user_attributes" VALUES(115,7,'fvu@blocks.1.hook_resid_pre','0.3');
INSERT INTO "trial_user_attributes" VALUES(116,7,'ce_recovered@blocks.0.hook_resid_pre','0.8');
INSERT INTO "trial_user_attributes" VALUES(117,7,'ce_recovered@blocks.1.hook_resid_pre','0.8');
INSERT INTO "trial_user_attributes" VALUES(118,7,'fraction_dead@blocks.0.hook_resid_pre','0.25');
INSERT INTO "trial_user_attributes" VALUES(119,7,'fraction_dead@blocks.1.hook_resid_pre','0.25');
INSERT INTO "trial_user_attributes" VALUES(120,8,'reason','"ValueError: the loss is not a number"');
INSERT INTO "trial_user_attributes" VALUES(121,8,'traceback','"Traceback (most recent call last)\n  ValueError: the loss is not a number"');
INSERT INTO "trial_user_attributes" VALUES(122,8,'failures','2');
INSERT INTO "trial_user_attributes" VALUES(123,10,'reason','"the disk is full"');
INSERT INTO "trial_user_attributes" VALUES(124,12,'run_dir','"/home/somebody/sweeps/output/old/11"');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_values" VALUES(1,1,0,1.57948207171314738417e+01,'FINITE');
INSERT INTO "trial_values" VALUES(2,1,1,2.34147253645852898573e-01,'FINITE');
INSERT INTO "trial_values" VALUES(3,1,2,2.01490064211698405305e-01,'FINITE');
INSERT INTO "trial_values" VALUES(4,1,3,0.955264357719717,'FINITE');
INSERT INTO "trial_values" VALUES(5,2,0,2.0,'FINITE');
INSERT INTO "trial_values" VALUES(6,2,1,6.07618548699136562518e-01,'FINITE');
INSERT INTO "trial_values" VALUES(7,2,2,5.72276795395013304634e-01,'FINITE');
INSERT INTO "trial_values" VALUES(8,2,3,9.28097059132365398426e-01,'FINITE');
INSERT INTO "trial_values" VALUES(9,3,0,8.0,'FINITE');
INSERT INTO "trial_values" VALUES(10,3,1,3.38528482888881487866e-01,'FINITE');
INSERT INTO "trial_values" VALUES(11,3,2,3.12655511422457288439e-01,'FINITE');
INSERT INTO "trial_values" VALUES(12,3,3,9.54391256572898694088e-01,'FINITE');
INSERT INTO "trial_values" VALUES(13,4,0,1.57330677290836646871e+01,'FINITE');
INSERT INTO "trial_values" VALUES(14,4,1,7.55736248641753899368e-02,'FINITE');
INSERT INTO "trial_values" VALUES(15,4,2,0.0868673221115775,'FINITE');
INSERT INTO "trial_values" VALUES(16,4,3,1.03123726803220883141e+00,'FINITE');
INSERT INTO "trial_values" VALUES(17,7,0,3.35,'FINITE');
INSERT INTO "trial_values" VALUES(18,7,1,0.5,'FINITE');
INSERT INTO "trial_values" VALUES(19,7,2,0.3,'FINITE');
INSERT INTO "trial_values" VALUES(20,7,3,0.8,'FINITE');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "trials" VALUES(1,0,1,'COMPLETE','2026-11-28 08:34:37.429642','2026-11-28 08:34:40.289966');
INSERT INTO "trials" VALUES(2,1,1,'COMPLETE','2026-11-28 08:34:37.429642','2026-11-28 08:34:41.522330');
INSERT INTO "trials" VALUES(3,2,1,'COMPLETE','2026-11-28 08:34:43.190100','2026-11-28 08:34:45.056442');
INSERT INTO "trials" VALUES(4,3,1,'COMPLETE','2026-11-28 08:34:43.190100','2026-11-28 08:34:46.183856');
INSERT INTO "trials" VALUES(5,4,1,'PRUNED','2026-11-28 08:34:47.722512','2026-11-28 08:34:47.750010');
INSERT INTO "trials" VALUES(6,5,1,'PRUNED','2026-11-28 08:34:47.752616','2026-11-28 08:34:47.759582');
INSERT INTO "trials" VALUES(7,6,1,'COMPLETE','2026-11-28 08:34:47.761678','2026-11-28 08:34:47.769863');
INSERT INTO "trials" VALUES(8,7,1,'FAIL','2026-11-28 08:34:47.793156','2026-11-28 08:34:47.798724');
INSERT INTO "trials" VALUES(9,8,1,'WAITING','2026-11-28 08:34:47.781360',NULL);
INSERT INTO "trials" VALUES(10,9,1,'WAITING','2026-11-28 08:34:47.787636',NULL);
INSERT INTO "trials" VALUES(11,10,1,'WAITING','2026-11-28 08:34:47.787636',NULL);
INSERT INTO "trials" VALUES(12,11,1,'RUNNING','2026-11-28 08:34:47.787636',NULL);
INSERT INTO "trials" VALUES(13,0,2,'WAITING',NULL,NULL);
INSERT INTO "trials" VALUES(14,1,2,'WAITING',NULL,NULL);
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO "version_info" VALUES(1,12,'5.0.0');
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
COMMIT;
