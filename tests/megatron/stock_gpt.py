"""Run in the place of ``pretrain_gpt.py`` with stock Megatron, as after an uninstall of this package."""

from tools.compare_stock import stock_on_cpu

if __name__ == "__main__":
    stock_on_cpu()
    from launch import pretrain_gpt

    pretrain_gpt.main()
