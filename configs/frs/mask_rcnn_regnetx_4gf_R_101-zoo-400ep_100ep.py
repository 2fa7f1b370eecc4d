# FRS on Detectron2's new baselines: Mask R-CNN on a RegNetX-4GF, 100 epochs from scratch, with the
# Mask R-CNN R101 of 400 epochs as teacher, downloaded at the start. Masks are taught through the
# FPN alone. Not a row of the paper. Not run here.
from detectron2 import model_zoo

_student = model_zoo.get_config("new_baselines/mask_rcnn_regnetx_4gf_dds_FPN_100ep_LSJ.py")
dataloader, lr_multiplier, model = _student.dataloader, _student.lr_multiplier, _student.model
optimizer, train = _student.optimizer, _student.train

distill = dict(
    METHODS=["FRS"],
    TEACHER=dict(CONFIG="new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py"),
    FRS=dict(FEATURE=dict(WEIGHT=0.002), CLS=dict(WEIGHT=0.1)),
)
