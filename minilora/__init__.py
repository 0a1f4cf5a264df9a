"""minilora: LoRA built from nothing, three times, each layer checked by the one before.

    numpy_lora   LAYER 1   arithmetic you can print              needs NumPy
    torch_lora   LAYER 2   the handwritten module                needs PyTorch
    qlora        LAYER 3   the same over a frozen 4-bit weight   a GPU if there is one, the same results if not
    methods                the family: DoRA and others, one paper a file
    llm                    the language model that is fine-tuned; knows nothing of LoRA
    train                  data, the loop, evaluation
    cpu                    products that a CPU does faster than torch; knows nothing of LoRA
    classroom              what only the lessons need: plots, sliders, exercises

Read in this order: numpy_lora/forward, numpy_lora/nf4, torch_lora/layers, torch_lora/inject,
torch_lora/peft_format, qlora/blockwise, qlora/linear, qlora/paged_adamw, train/trainer.

Letters and words, one meaning each:

    W (out, in)       the frozen weight             A (r, in), B (out, r)   LoRA's matrices; B is never the batch
    r                 LoRA's rank                   alpha, scaling          strength; the factor in front of B A
    base              the module under an adapter   delta_weight()          scaling · B A
    absmax            one unit a block              block_size              weights that share an absmax
    codebook          16 values                     codes, packed           indices 0..15; two codes to a byte
    targets           last parts of module names    wrap                    a function module -> module

Papers, as the docstrings name them:

    [LoRA]    Hu et al. 2021, arXiv 2106.09685       [rsLoRA]  Kalajdzievski 2023, arXiv 2312.03732
    [QLoRA]   Dettmers et al. 2023, arXiv 2305.14314 [8bit]    Dettmers et al. 2021, arXiv 2110.02861
    [Kaiming] He et al. 2015, arXiv 1502.01852       [AdamW]   Loshchilov & Hutter 2017, arXiv 1711.05101
    [RoPE]    Su et al. 2021, arXiv 2104.09864       [GQA]     Ainslie et al. 2023, arXiv 2305.13245
    [SwiGLU]  Shazeer 2020, arXiv 2002.05202         [RMSNorm] Zhang & Sennrich 2019, arXiv 1910.07467
    [Attention]      Vaswani et al. 2017, arXiv 1706.03762
    [Checkpointing]  Chen et al. 2016, arXiv 1604.06174
    [TIES]    Yadav et al. 2023, arXiv 2306.01708    [DARE]    Yu et al. 2023, arXiv 2311.03099
    [DoRA]    Liu et al. 2024, arXiv 2402.09353      [LoRAPlus] Hayou et al. 2024, arXiv 2402.12354
    [IA3]     Liu et al. 2022, arXiv 2205.05638      [Houlsby] Houlsby et al. 2019, arXiv 1902.00751
    [AdaLoRA] Zhang et al. 2023, arXiv 2303.10512    [GaLore]  Zhao et al. 2024, arXiv 2403.03507
    [PiSSA]   Meng et al. 2024, arXiv 2404.02948     [OLoRA]  Büyükakyüz 2024, arXiv 2406.01775
    [LoftQ]   Li et al. 2023, arXiv 2310.08659
    [PrefixTuning]   Li & Liang 2021, arXiv 2101.00190
    [PromptTuning]   Lester et al. 2021, arXiv 2104.08691
    [Halko]          Halko, Martinsson & Tropp 2011, arXiv 0909.4061
    [RoyVetterli]    Roy & Vetterli 2007, The effective rank
"""

__version__ = "0.1.0"
