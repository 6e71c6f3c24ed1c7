"""Fine-tune a model through fake quantization, export it packed, and know what it cost.

python train.py recipe=llama_int4_qat
python train.py --help
"""

from qat.main import main

if __name__ == "__main__":
    main()
